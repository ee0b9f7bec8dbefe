"""A router: predictors of `carina finetune` that tell chests from the rest, and PA from AP and lateral."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from carina.data.labels import ABNORMAL
from carina.errors import CarinaError, nearest
from carina.files import sha256
from carina.imaging.geometry import Geometry
from carina.imaging.photometry import Photometry
from carina.imaging.routing import FAMILIAR, LABELS
from carina.models.predictor import Predictor, load_predictor

BATCH = 64
DECIMALS = 4  # of a probability: the last bits of a float depend on the machine, what a store says of an image must not


class Router:
    """Routing predictors, loaded once, in the process that calls prepare: they see every image at one small scale.

    run: a run or predictor folder of `carina finetune classify`, whose labels are among `carina.imaging.routing.LABELS`;
    or several, separated by commas, with other labels each. One of them may be of `carina finetune anomaly`, trained on
    chests (abnormal = 0): it says which images are unlike all of them, which no classifier knows of body parts that it
    was never shown. All read one scale, geometry and photometry.

    Attributes: labels, scale, photometry, geometry, fingerprint (of weights and settings, wherever they lie). Scores are
    made on the CPU in batches of one shape, so that they do not depend on how an archive is cut into batches.
    Raises CarinaError for other predictors.
    """

    def __init__(self, run: str):
        self.run = str(run)
        self._classifiers: list[Predictor] = []
        self._gate: Predictor | None = None
        folders = [part.strip() for part in self.run.split(",")]
        predictors = [load_predictor(folder) for folder in folders]
        for folder, predictor in zip(folders, predictors):
            self._take(folder, predictor)
        self.labels = tuple(label for predictor in self._classifiers for label in predictor.labels)
        self.scale: int = _one(self.run, "scale", [scale for p in predictors for scale in p.scales])
        self.photometry = Photometry.from_dict(_one(self.run, "photometry", [p.info["photometry"] for p in predictors]))
        self.geometry = Geometry.from_dict(_one(self.run, "geometry", [p.info["geometry"] for p in predictors]))
        self.fingerprint = _fingerprint(folders)

    def _take(self, folder: str, predictor: Predictor) -> None:
        if predictor.info["kind"] == "anomaly":
            if self._gate is not None:
                raise CarinaError(f"router={self.run} holds two anomaly detectors; give one beside the classifiers")
            self._gate = predictor
            return
        if predictor.info["kind"] != "classify":
            raise CarinaError(
                f"router={folder} is a predictor for {predictor.info['kind']}; a router is trained with carina "
                "finetune classify"
            )
        for label in predictor.labels:
            if label not in LABELS:
                raise CarinaError(
                    f"router={folder} predicts '{label}'{nearest(label, LABELS)}, but a router's labels are among "
                    f"{', '.join(LABELS)}; train one with labels=[chest,PA,AP]"
                )
            if any(label in other.labels for other in self._classifiers):
                raise CarinaError(f"two runs of router={self.run} predict '{label}'; give one for each label")
        self._classifiers.append(predictor)

    def check(self, photometry: Photometry) -> None:
        """Raise CarinaError unless images developed by `photometry` are what the router was trained on."""
        mine, theirs = asdict(self.photometry), asdict(photometry)
        # `frames` says which files are read, not how they look
        different = [name for name in mine if name != "frames" and mine[name] != theirs[name]]
        if different:
            wanted = ", ".join(f"{name}={mine[name]}" for name in different)
            given = ", ".join(f"{name}={theirs[name]}" for name in different)
            raise CarinaError(
                f"router={self.run} was trained on images with {wanted}, this recipe has {given}; give {wanted}, or "
                "train a router on a store that was prepared like this one"
            )

    def scores(self, images: np.ndarray) -> list[dict[str, float]]:
        """What `carina.imaging.routing.decide` takes, one dict an image: probabilities with four decimals, and
        `FAMILIAR` as 1 or 0 where an anomaly detector was given (at its threshold).

        images: (B, S, S) uint8 at the router's scale and geometry, any B.
        """
        if images.ndim != 3 or images.dtype != np.uint8 or images.shape[1:] != (self.scale, self.scale):
            raise CarinaError(
                f"router={self.run} reads (B, {self.scale}, {self.scale}) uint8, not {images.shape} {images.dtype}; "
                "prepare the images at its scale"
            )
        rows: list[dict[str, float]] = [{} for _ in images]
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            full = np.zeros((BATCH, self.scale, self.scale), dtype=np.uint8)
            full[: len(part)] = part
            tensor = {self.scale: torch.from_numpy(full).unsqueeze(1).float().div_(255)}
            for predictor in self._classifiers:
                values = predictor.scores(tensor).round(DECIMALS)
                for row, line in zip(rows[start:], values[: len(part)]):
                    row.update(zip(predictor.labels, map(float, line)))
            if self._gate is not None:
                near = self._gate.scores(tensor)[:, 0] <= self._gate.info["thresholds"][ABNORMAL]
                for row, value in zip(rows[start:], near[: len(part)]):
                    row[FAMILIAR] = float(value)
        return rows


def _one(run: str, what: str, values: list) -> object:
    """The value that all share."""
    if any(value != values[0] for value in values):
        raise CarinaError(
            f"router={run} mixes {what} {values[0]} and {next(v for v in values if v != values[0])}, but sees every image "
            "once; train its parts on one store, at one scale"
        )
    return values[0]


def _fingerprint(folders: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        inner = Path(folder) / "predictor"
        root = inner if inner.is_dir() else Path(folder)
        for file in sorted(root.rglob("*")):
            if file.suffix in (".json", ".safetensors"):
                digest.update(f"{file.relative_to(root).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()
