"""One training loop of SimCLR with a ResNet-18, by carina or by a peer: images a second and the loss of every step.

    PYTHON benchmarks/simclr_loop.py JSON_FILE

`benchmarks/pretrain.py` writes the JSON file and runs this script in the environment of each side, so nothing of carina
is imported unless the side is carina. All sides get
the same images, batch, augmentations (as near as their settings go), head depth, temperature, optimizer, precision,
threads and workers; telemetry and loggers are off. Their losses are alike, not equal: carina's has no negatives of the
same patient, and the rates warm up in different ways. The clock runs inside the process from the end of step `warm` to
the end of the last one, so that no start-up is counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

OFF = {
    "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
    "LIGHTLY_TRAIN_POSTHOG_KEY": "",
    "LIGHTLY_TRAIN_LOG_LEVEL": "ERROR",
    "LOGURU_LEVEL": "ERROR",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
TEMPERATURE, DIMENSION, RATE, MOMENTUM, DECAY = 0.2, 128, 0.3, 0.9, 1e-4  # the rate counts for 256 images
AREA, ASPECT, ROTATION, GAMMA, SIGMA = (0.5, 1.0), (0.9, 1.11), 10, (0.8, 1.25), 0.004  # carina's default views
JITTER = 0.2  # peers have no gamma; a jitter of brightness and contrast takes about the same work


class Marks:
    """When every step ended (wall clock, and processor time of this process without its workers), and its loss as a
    tensor that nobody has waited for yet."""

    def __init__(self, steps: int, warm: int):
        self.steps, self.warm = steps, warm
        self.times: list[float] = []
        self.processor: list[float] = []
        self.losses: list[Any] = []

    def step(self, loss: Any) -> None:
        import torch

        self.losses.append(loss)
        if torch.cuda.is_available() and len(self.losses) in (self.warm, self.steps):
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())

    def result(self, batch_size: int) -> dict[str, Any]:
        wall, processor = (taken[-1] - taken[self.warm - 1] for taken in (self.times, self.processor))
        images = batch_size * (len(self.times) - self.warm)
        return {
            "images_per_second": round(images / wall, 2),
            "images_per_processor_second": round(images / processor, 2),
            "losses": [round(float(loss), 4) for loss in self.losses],
        }


def carina(job: dict[str, Any], marks: Marks) -> dict[str, Any]:
    from carina.data.store import select
    from carina.pretrain.recipe import PretrainRecipe
    from carina.pretrain.run import build_task
    from carina.recipes import build
    from carina.runs import Run
    from carina.training.engine import Engine, resolved

    recipe = build(
        "pretrain",
        PretrainRecipe,
        "default",
        {
            "store": job["store"],
            "rows": "all",
            "scales": [job["size"]],
            "pretexts": {"simclr": {"weight": 1.0, "temperature": TEMPERATURE, "dimension": DIMENSION}},
            "views": {"area": AREA, "aspect": ASPECT, "rotation": ROTATION, "gamma": GAMMA, "blur": SIGMA},
            "steps": job["steps"],
            "epochs": None,
            "batch_size": job["batch_size"],
            "optim": {"lr": RATE, "lr_rule": "linear", "momentum": MOMENTUM, "weight_decay": DECAY},
            "precision": {"float32": "no", "bf16": "bf16"}[job["precision"]],
            "threads": job["threads"],
            "workers": job["workers"],
            "wandb": "off",
            "out": job["folder"],
        },
    )
    recipe = resolved(recipe, None, False)
    selection = select(recipe.store, rows=recipe.rows, scales=recipe.scales)
    engine = Engine(
        build_task(recipe, selection, 1), selection, recipe, scales=recipe.scales, name="pretrain", quiet=True
    )
    waited = []

    def observe(_step: int, means: dict[str, float]) -> dict[str, Any]:
        marks.step(means["loss"])
        waited.append(engine.batches.waited)
        return {}

    engine.fit(Run.start(recipe.out, "pretrain", recipe, quiet=True), observe=observe)
    wait = (waited[-1] - waited[marks.warm - 1]) / (marks.times[-1] - marks.times[marks.warm - 1])
    return {"channels": 1, "data_wait": round(wait, 5), "packages": packages("torch", "timm", "lightly", "accelerate")}


def lightly_train(job: dict[str, Any], marks: Marks) -> dict[str, Any]:
    import lightly_train
    from lightly_train._methods.simclr.simclr import SimCLR

    plain = SimCLR.on_train_batch_end

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:  # its settings take no callback of ours
        plain(self, outputs, batch, batch_idx)
        marks.step((outputs["loss"] if isinstance(outputs, dict) else outputs).detach())

    SimCLR.on_train_batch_end = on_train_batch_end
    per_epoch = len(list(Path(job["images"]).iterdir())) // job["batch_size"]
    lightly_train.pretrain(
        out=job["folder"],
        data=job["images"],
        model="torchvision/resnet18",
        method="simclr",
        method_args={"temperature": TEMPERATURE, "hidden_dim": 512, "output_dim": DIMENSION},
        epochs=-(-job["steps"] // per_epoch),
        batch_size=job["batch_size"],
        num_workers=job["workers"],
        devices=1,
        accelerator=job["device"],
        precision=lightning_precision(job),
        optim="sgd",
        optim_args={"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY},
        loggers={"jsonl": None, "tensorboard": None},
        callbacks={
            "learning_rate_monitor": None,
            "early_stopping": None,
            "model_export": None,
            "model_checkpoint": None,
        },
        transform_args={
            "image_size": (job["size"], job["size"]),
            "random_resize": {
                "min_scale": AREA[0],
                "max_scale": AREA[1],
                "min_ratio": ASPECT[0],
                "max_ratio": ASPECT[1],
            },
            "random_flip": None,
            "random_rotation": {"prob": 1.0, "degrees": ROTATION, "interpolation": 1},
            "color_jitter": {
                "prob": 1.0,
                "strength": 1.0,
                "brightness": JITTER,
                "contrast": JITTER,
                "saturation": 0.0,
                "hue": 0.0,
            },
            "random_gray_scale": None,
            "gaussian_blur": {"prob": 1.0, "sigmas": (0.1, SIGMA * job["size"]), "blur_limit": 0},
        },
        trainer_args={"max_steps": job["steps"], "enable_checkpointing": False},
    )
    return {"channels": 3, "packages": packages("lightly-train", "torch", "torchvision", "pytorch-lightning")}


def stable_pretraining(job: dict[str, Any], marks: Marks) -> dict[str, Any]:
    import lightning
    import stable_pretraining as spt
    import torch
    from PIL import Image
    from stable_pretraining.data import transforms
    from stable_pretraining.forward import simclr
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import ColorJitter

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            marks.step(outputs["loss"].detach())

    class Pictures(torch.utils.data.Dataset):
        def __init__(self):
            self.paths = sorted(Path(job["images"]).iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> tuple[Image.Image, int]:
            return Image.open(self.paths[number]).convert("RGB"), 0

    view = transforms.Compose(
        transforms.RandomResizedCrop((job["size"], job["size"]), scale=AREA, ratio=ASPECT),
        transforms.RandomRotation(ROTATION, interpolation=InterpolationMode.BILINEAR),
        transforms.WrapTorchTransform(ColorJitter(brightness=JITTER, contrast=JITTER)),
        transforms.PILGaussianBlur(sigma=(0.1, SIGMA * job["size"])),
        transforms.ToImage(mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    images = spt.data.FromTorchDataset(
        Pictures(), names=["image", "label"], transform=transforms.MultiViewTransform([view, view])
    )
    loader = torch.utils.data.DataLoader(
        images, job["batch_size"], shuffle=True, drop_last=True, num_workers=job["workers"],
        persistent_workers=job["workers"] > 0, pin_memory=job["device"] == "gpu",
    )  # fmt: skip
    projector = torch.nn.Sequential(
        torch.nn.Linear(512, 512, bias=False),
        torch.nn.BatchNorm1d(512),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(512, DIMENSION, bias=False),
        torch.nn.BatchNorm1d(DIMENSION),
    )
    module = spt.Module(
        forward=simclr,
        backbone=spt.backbone.from_timm("resnet18", num_classes=0),
        projector=projector,
        simclr_loss=spt.losses.NTXEntLoss(temperature=TEMPERATURE),
        optim={
            "optimizer": {
                "type": "SGD", "lr": RATE * job["batch_size"] / 256, "momentum": MOMENTUM, "weight_decay": DECAY
            },
            "scheduler": {"type": "CosineAnnealingLR", "T_max": job["steps"]},
            "interval": "step",
        },
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_steps=job["steps"],
        accelerator=job["device"],
        devices=1,
        precision=lightning_precision(job),
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job["folder"],
    )
    trainer.fit(module, spt.data.DataModule(train=loader))
    return {"channels": 3, "packages": packages("stable-pretraining", "torch", "torchvision", "timm", "lightning")}


def lightning_precision(job: dict[str, Any]) -> str:
    return {"float32": "32-true", "bf16": "bf16-mixed"}[job["precision"]]


def packages(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


SIDES = {"carina": carina, "lightly-train": lightly_train, "stable-pretraining": stable_pretraining}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    caches = {"LIGHTLY_TRAIN_CACHE_DIR": job["folder"], "SPT_CACHE_DIR": str(Path(job["folder"]).absolute())}
    os.environ.update(OFF | caches)

    import torch

    torch.set_num_threads(job["threads"])
    if job["device"] == "gpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job["tf32"]
    marks = Marks(job["steps"], job["warm"])
    facts = SIDES[job["side"]](job, marks)
    Path(job["out"]).write_text(json.dumps({**facts, **marks.result(job["batch_size"])}), encoding="utf-8")


if __name__ == "__main__":
    main()
