"""What frozen networks read of a store's images, kept on disk so that nothing is read twice.

CACHE/<32 digits>.safetensors   what one network reads of one scale of one store: tensors "0", "1", ... (N, ...) float32, a
                                row an image of the store, in the order of image_id; no identifier is kept
CACHE/README.txt                that these are data of patients

The digits are a hash over all that decides the values: the weights and what the network is fed, the store's pixels, scale,
size, what is read, and the versions and the kind of device that compute it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open

from carina.data.batches import in_order
from carina.data.store import Selection, Store
from carina.errors import CarinaError
from carina.files import atomic_path, write_text
from carina.models.backbones import Backbone, resize_images
from carina.progress import Progress

Read = Callable[[Backbone, torch.Tensor], list[torch.Tensor]]
WORTH = 0.1  # share of a store's rows below which they are read alone, without filling the cache
NOTE = """What networks read of radiographs, kept by carina so that fine-tuning on frozen weights is fast.

These are data of patients: a feature can tell two images of one person from those of others, and images can in part be
rebuilt from it. Keep this folder where the images may be kept, and do not publish it. It may be deleted at any time.
"""


def weights_digest(backbone: Backbone) -> str:
    """SHA-256 over name, type, shape and bytes of every parameter and buffer that a state dict holds."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _key(weights: str, backbone: Backbone, store: Store, scale: int, size: int, name: str, device: torch.device) -> str:
    spec = {k: v for k, v in backbone.spec.to_dict().items() if k not in ("size", "origin", "license", "checksum")}
    facts = {
        "weights": weights,
        "network": [type(part).__qualname__ for part in (backbone, backbone.network)],
        "spec": spec,
        "pixels": [store.info["store_hash"], store.info["scales"], store.info["encoding"]],
        "read": [name, scale, size],
        "by": [torch.__version__, timm.__version__, device.type],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@torch.no_grad()
def read_all(
    backbone: Backbone,
    selection: Selection,
    scale: int,
    read: Read,
    name: str,
    *,
    size: int | None = None,
    cache: str | Path | None = None,
    device: torch.device,
    quiet: bool = True,
) -> list[np.ndarray]:
    """What `read` gives of every row, [(N, ...)] float32 in the order of the rows, in evaluation mode and full precision.

    read: takes the backbone and images (B, 1, size, size) in [0, 1]. name: says what it reads, one name for one reading of a
    backbone. size: what enters the network, in pixels (default: the backbone's own). cache: a folder of files as above. What
    it lacks is read of all rows of a store, so that other rows of it are there next time; fewer than a tenth of a store's
    rows are read alone. Batches differ between the two, so their values agree to rounding.
    """
    size = size or backbone.spec.size
    backbone = backbone.to(device).eval()

    def parts(rows: Selection, what: str) -> Iterator[tuple[slice, list[np.ndarray]]]:
        with Progress(what, len(rows), unit="images", quiet=quiet) as progress:
            for places, images in in_order(rows, scale, device):
                yield places, [part.float().cpu().numpy() for part in read(backbone, resize_images(images, size))]
                progress.advance(len(images))

    if cache is None:
        pieces = [found for _, found in parts(selection, "features")]
        return [np.concatenate(piece) for piece in zip(*pieces)]
    weights, results = weights_digest(backbone), None
    numbers, positions = (selection.table[column].to_numpy() for column in ("_store", "_position"))
    for number in np.unique(numbers):
        store, places = selection.stores[number], np.flatnonzero(numbers == number)
        path = Path(cache) / f"{_key(weights, backbone, store, scale, size, name, device)}.safetensors"
        order = np.argsort(store.table["image_id"].to_numpy())
        if path.is_file() or len(places) >= WORTH * len(store):
            if not path.is_file():
                whole = Selection(selection.stores, store.table.assign(_store=number, _position=np.arange(len(store))))
                if not (Path(cache) / "README.txt").is_file():
                    write_text(Path(cache) / "README.txt", NOTE)
                _write(path, len(store), parts(whole.where(order), f"features of all rows of {store.folder.name}"))
            found = _rows(path, np.argsort(order)[positions[places]])
        else:
            pieces = [piece for _, piece in parts(selection.where(places), "features")]
            found = [np.concatenate(piece) for piece in zip(*pieces)]
        results = results or [np.empty((len(selection), *part.shape[1:]), np.float32) for part in found]
        for result, part in zip(results, found):
            result[places] = part
    return results


def _write(path: Path, count: int, parts: Iterator[tuple[slice, list[np.ndarray]]]) -> None:
    """A safetensors file of `count` rows, written batch by batch: what is kept may be larger than the memory."""
    first = next(parts)
    header, end = {}, 0
    for number, part in enumerate(first[1]):
        begin, end = end, end + count * part[0].nbytes
        header[str(number)] = {"dtype": "F32", "shape": [count, *part.shape[1:]], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for rows, found in itertools.chain([first], parts):
            for entry, part in zip(header.values(), found):
                handle.seek(8 + len(text) + entry["data_offsets"][0] + rows.start * part[0].nbytes)
                handle.write(part.tobytes())
        handle.flush()


def _rows(path: Path, places: np.ndarray) -> list[np.ndarray]:
    """The rows asked for, from the file as it lies on the disk."""
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(str(number))[places].numpy() for number in range(len(file.keys()))]
    except SafetensorError as error:
        raise CarinaError(f"{path} is not a whole safetensors file ({error}); it may be damaged: delete it") from None
