"""Multi-label classification by gradients: the whole network or parts of it, or a head on what frozen weights give."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from carina.data.batches import Batch
from carina.data.store import Selection
from carina.draws import hash64, permutation
from carina.errors import CarinaError
from carina.finetune.attention import disagreement, mirrored_targets, moved
from carina.finetune.losses import make_loss
from carina.finetune.mixing import CutRemain, mix, size_notes
from carina.finetune.modes import add_lora, merge_lora, rest_frozen_norms, train_last
from carina.finetune.recipe import FinetuneRecipe, few
from carina.imaging.views import make_view
from carina.models.backbones import Backbone
from carina.models.heads import Head, make_head
from carina.training.engine import Task, pick_device
from carina.training.optim import base_rate, decay_at, make_optimizer, rate_at


class Classification(Task):
    """Backbone and head on labelled images: what moves, views, mixing, objective, and agreement of attention.

    selection, targets: the training rows and their targets (N, L), NaN where unknown. recipe: as the engine gets it.
    sizes: what enters the network of images of each scale, in pixels (default: the backbone's size for all).
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: FinetuneRecipe,
        selection: Selection,
        targets: np.ndarray,
        sizes: dict[int, int] | None = None,
    ):
        super().__init__()
        self.backbone, self.recipe, self.sizes = backbone, recipe, sizes or {}
        self.head = make_head(recipe.head, backbone, recipe.labels, recipe.seed)
        if recipe.mode == "partial":
            train_last(backbone, recipe.blocks)
        elif recipe.mode == "lora":
            add_lora(backbone, recipe.lora, recipe.seed)
        self.loss = make_loss(recipe.loss, targets, recipe.total_steps(len(selection)))
        mixing = recipe.mixing
        self.cut = CutRemain(selection, targets, recipe.labels, mixing) if mixing.name == "cut_remain" else None
        both = [((target > 0.5).any() and (target < 0.5).any()) for target in targets.T]
        self.one_class = [label for label, two in zip(recipe.labels, both) if not two]
        # heads on maps leave what follows them in the network without a gradient
        self.skips_parameters = recipe.head.name not in ("linear", "mlp")

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def notes(self) -> list[str]:
        """What the log should say beforehand."""
        alone = "the training rows hold one class only, so its scores will say nothing; leave the label out"
        return [f"{label}: {alone}" for label in self.one_class] + size_notes(self.recipe.labels, self.recipe.mixing)

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.recipe.mode in ("partial", "lora"):
            rest_frozen_norms(self.backbone)
        return self

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        view, targets = self._view(batch)
        read = self.head.read(self.backbone, view)
        # after accumulated micro-batches the step of a batch follows from its number
        loss = self.loss(self.head(read), targets, batch.key[1] // recipe.accumulate)
        if recipe.consistency.weight == 0:
            return {"loss": loss}
        other, theta, flipped = moved(view, batch.draws.part("consistency"), recipe.consistency)
        after = self.head.spread(self.head.read(self.backbone, other))
        apart = disagreement(self.head.spread(read), after, theta, flipped, recipe.labels).mean()
        return {"loss": loss + recipe.consistency.weight * apart, "classification": loss, "disagreement": apart}

    def _view(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the network (B, 1, s, s), and its targets (B, L)."""
        recipe, images, targets = self.recipe, batch.images, batch.targets
        if self.cut is not None:
            images, targets = self.cut(images, targets, batch.draws)
        draws = batch.draws.part("classify")
        view = make_view(images, draws, recipe.views, self.sizes.get(batch.scale, self.backbone.spec.size))
        if recipe.views.flip > 0:
            targets = mirrored_targets(targets, draws.coin("flip", recipe.views.flip), recipe.labels)
        if recipe.mixing.name in ("mixup", "cutmix"):
            return mix(view, targets, recipe.mixing, batch.key)
        return view, targets

    def finish(self) -> None:
        """Called when the training is done; leaves a plain timm network in `backbone`."""
        if self.recipe.mode == "lora":
            merge_lora(self.backbone)


def check(recipe: FinetuneRecipe) -> None:
    """Raise CarinaError where a recipe of task=classify asks for what its mode or head cannot do."""
    if len(set(recipe.labels)) < len(recipe.labels):
        raise CarinaError(f"labels={recipe.labels} names a label twice; give each once")
    if recipe.permute_labels and recipe.mixing.name == "cut_remain":
        raise CarinaError(
            "permute_labels=true deals labels out anew, and the boxes of mixing.name=cut_remain would betray the true ones; "
            "give mixing.name=none"
        )
    if recipe.mode == "frozen":
        if recipe.mixing.name != "none":
            raise CarinaError(
                f"mixing.name={recipe.mixing.name} changes training images, and mode=frozen reads each of them once; give "
                "mode=partial, full or lora"
            )
        if recipe.consistency.weight > 0:
            raise CarinaError(
                "consistency.weight needs a network that is trained, and mode=frozen trains none; give mode=partial, full "
                "or lora"
            )
        if recipe.head.name == "linear" and recipe.loss.name != "bce":
            raise CarinaError(
                f"loss.name={recipe.loss.name} is for heads that are trained by gradients, and mode=frozen with a linear "
                "head is a logistic regression; give head.name=mlp, or another mode"
            )
    elif recipe.consistency.weight > 0 and recipe.head.name in ("linear", "mlp"):
        raise CarinaError(
            f"consistency.weight compares attention, and head.name={recipe.head.name} has none; give head.name=multiscale, "
            "attentive or lse"
        )


def train_head(head: Head, read: list[np.ndarray], targets: np.ndarray, recipe: FinetuneRecipe, seed: int) -> Head:
    """The head, trained by gradients on what it read of N images with frozen weights; on the CPU, in evaluation mode.

    read: arrays (N, ...) as `head.read` gives them. targets: (N, L), NaN where unknown. The recipe gives the loss, the
    optimizer with its schedule, and as many steps as the training of a network has; order and dropout follow from
    `seed`.
    """
    device = pick_device()
    recipe = few(recipe, len(targets))
    head = head.to(device)
    parts = [torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in read]
    wanted = torch.from_numpy(np.asarray(targets, dtype=np.float32))
    head.standardize(parts)
    count = len(wanted)
    batch_size, steps = min(recipe.batch_size, count), recipe.total_steps(count)
    loss = make_loss(recipe.loss, targets, steps)
    peak = base_rate(recipe.optim, batch_size)
    optimizer = make_optimizer(head, recipe.optim, peak)
    each = count // batch_size
    head.train()
    with torch.random.fork_rng():
        torch.manual_seed(hash64("train head", seed) >> 1)
        for step in range(steps):
            epoch, place = divmod(step, each)
            if place == 0:
                order = torch.from_numpy(permutation(count, "train head", seed, epoch))
            rows = order[place * batch_size : (place + 1) * batch_size]
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, peak, recipe.optim) * group["scale"]
                group["weight_decay"] = decay_at(step, steps, recipe.optim) if group["weight_decay"] else 0.0
            optimizer.zero_grad(set_to_none=True)
            logits = head([part[rows].to(device) for part in parts])
            loss(logits, wanted[rows].to(device), step).backward()
            if recipe.optim.clip is not None:
                nn.utils.clip_grad_norm_(head.parameters(), recipe.optim.clip)
            optimizer.step()
    return head.cpu().eval()
