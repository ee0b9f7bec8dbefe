"""The tensors of a weights file by name. Nothing but plain tensors is ever read, so no pickled code runs."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from carina.errors import CarinaError

# What training code puts its tensors under, beside the epoch, the optimizer and the like
CONTAINERS = ("state_dict", "model", "module", "teacher")
CONVERT = (
    "import torch, safetensors.torch as s; d = torch.load({given!r}, map_location='cpu', weights_only=False); "
    "d = d.state_dict() if hasattr(d, 'state_dict') else d; d = d.get('state_dict', d.get('model', d)); "
    "s.save_file({{k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}}, {made!r})"
)


class Tensors(dict[str, torch.Tensor]):
    """Tensors by name. Asking for one that is not there means that the file has another layout: a CarinaError."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], told: str):
        super().__init__(tensors)
        self.told = told  # the file and the layout it was named with, for messages

    def __missing__(self, name: str) -> torch.Tensor:
        first = next(iter(self), "nothing")
        raise CarinaError(
            f"{self.told}: it has no tensor {name} (the first it has is {first}); give the file that was published, or "
            "name the kind it is of"
        )

    def under(self, *prefixes: str) -> Tensors:
        """Those under the first of the prefixes that there is, without it; all as they are where there is none."""
        for prefix in prefixes:
            if any(name.startswith(prefix) for name in self):
                kept = {name[len(prefix) :]: value for name, value in self.items() if name.startswith(prefix)}
                return Tensors(kept, self.told)
        return self

    def without(self, pattern: str) -> Tensors:
        """Those whose names do not begin with the regular expression: what is known and not needed is left out."""
        return Tensors({name: value for name, value in self.items() if not re.match(pattern, name)}, self.told)

    def renamed(self, rules: Mapping[str, str]) -> Tensors:
        """Every regular expression of `rules`, in order, replaced in every name."""
        named = {}
        for name, value in self.items():
            for pattern, replacement in rules.items():
                name = re.sub(pattern, replacement, name)
            named[name] = value
        return Tensors(named, self.told)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file, or of what torch.save wrote, out of the usual containers of training code.

    Raises CarinaError where the file is damaged, or holds anything that only pickled code could read.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CarinaError(f"{path} is not a whole safetensors file ({error}); download or write it again") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if blocked is None:
            raise _unreadable(path, error) from None
        made = path.with_suffix(".safetensors")
        raise CarinaError(
            f"{path} holds {blocked[1]} beside its tensors, and reading that could run any code, so it is not read; if you "
            f"trust where it comes from, write its tensors to {made.name} with this line and give that file: "
            f'python -c "{CONVERT.format(given=str(path), made=str(made))}"'
        ) from None
    except Exception as error:  # torch names damage in several ways
        raise _unreadable(path, error) from None
    return _inner(path, found)


def _inner(path: Path, found: object) -> dict[str, torch.Tensor]:
    while isinstance(found, dict):
        inner = next((found[name] for name in CONTAINERS if isinstance(found.get(name), dict)), None)
        if inner is None:
            break
        found = inner
    tensors = {str(k): v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, dict) else {}
    if not tensors:
        raise CarinaError(f"{path} holds no weights by name; give a file of a state dict, or safetensors")
    return tensors


def _unreadable(path: Path, error: Exception) -> CarinaError:
    return CarinaError(
        f"{path} cannot be read as plain tensors ({type(error).__name__}); it may be damaged: download it again, or give "
        "the weights as safetensors"
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
