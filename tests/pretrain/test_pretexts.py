"""Every pretext on the same small batches: what a loss may rely on, and what a method must not see."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import METHODS, Corpus, method
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

RECIPE = build("pretrain", PretrainRecipe, "debug/moco_anatpaste", ["pretexts.moco.queue=512"])
SIZES = (32, 64)


def corpus(**changes):
    values = dict(
        count=256, batch_size=16, micro_batch=16, scales=SIZES, size=None, views=RECIPE.views, seed=0, steps=100
    )
    return Corpus(**{**values, **changes})


def batch(scale=64, count=16, epoch=0, patients=None):
    codes = torch.arange(count, dtype=torch.int64) + 1000 * epoch
    generator = torch.Generator().manual_seed(epoch)
    images = torch.rand(count, 1, scale, scale, generator=generator)
    masks = torch.zeros(count, 1, scale, scale, dtype=torch.bool)
    masks[..., scale // 4 : -scale // 4, scale // 5 : -scale // 5] = True
    owners = codes if patients is None else torch.tensor(patients)
    groups = {"image": codes, "study": codes, "patient": owners}
    return Batch(images, masks, groups, None, Draws(0, epoch, codes.numpy().astype(np.uint64)), scale, (0, epoch, 0))


SMALL = dict(dimension=32, hidden=64, bottleneck=16, prototypes=32, width=32, depth=1, heads=2)
TOKENS = {"mae", "dinov2"}  # methods of plain vision transformers


def build_pretext(name, architecture="test_resnet", **changes):
    backbone = random_backbone(architecture, 64, 0)
    settings = getattr(RECIPE.pretexts, name)
    small = {key: value for key, value in SMALL.items() if key in type(settings).model_fields}
    return backbone, method(name)(backbone, settings.model_copy(update=small), corpus(**changes))


def pictures(views):
    """The images among whatever a method makes of a batch."""
    if dataclasses.is_dataclass(views):
        views = vars(views)
    if isinstance(views, dict):
        views = list(views.values())
    if isinstance(views, (list, tuple)):
        return [image for view in views for image in pictures(view)]
    return [views] if isinstance(views, torch.Tensor) and views.ndim == 4 and views.is_floating_point() else []


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_finite_at_two_sizes_and_the_state_goes_round(name, architecture):
    if name in TOKENS and architecture == "test_resnet":
        with pytest.raises(CarinaError, match="vit"):
            build_pretext(name, architecture)
        return
    backbone, pretext = build_pretext(name, architecture)
    trained = [p for p in [*backbone.parameters(), *pretext.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    for step, scale in enumerate((64, 32, 64)):
        piece = batch(scale, epoch=step)
        views = pretext.views(piece)
        images = pictures(views)
        assert images[0].shape[-1] == scale
        for image in images:
            assert len(image) % 16 == 0 and image.shape[1] == 1 and image.shape[2] == image.shape[3] <= scale
            assert image.min() >= 0 and image.max() <= 1
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 2):
            values = pretext.loss(backbone, views, piece)
        assert values["loss"].dtype == torch.float32
        assert all(torch.isfinite(value) for value in values.values())
        assert not any(value.requires_grad for key, value in values.items() if key != "loss")
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        pretext.after_step(backbone, step)
    assert any(not torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    if pretext.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in pretext.teacher.parameters())
    again = build_pretext(name, architecture)[1]
    again.load_state_dict(pretext.state_dict())
    piece = batch(64, epoch=9)
    pretext.eval(), again.eval(), backbone.eval()
    with torch.no_grad():
        losses = [p.loss(backbone, p.views(piece), piece)["loss"] for p in (pretext, again)]
    assert losses[0] == losses[1]


def test_moco_loss_equals_infonce_written_anew():
    backbone, moco = build_pretext("moco", "test_vit")
    piece = batch(64, patients=[1, 2, 3, 4] * 4)
    moco.owners_64[:8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    views = moco.views(piece)
    loss = moco.loss(backbone, views, piece)["loss"].item()
    with torch.no_grad():
        q = F.normalize(moco.head(backbone(views[0])), dim=1).double().numpy()
        k = F.normalize(moco.key_head(moco.key_backbone(views[1])), dim=1).double().numpy()
    queue, owners = moco.queue_64.double().numpy(), moco.owners_64.numpy()
    total = 0.0
    for i in range(16):
        others = queue[owners != piece.groups["patient"][i].item()]
        logits = np.concatenate([[q[i] @ k[i]], others @ q[i]]) / RECIPE.pretexts.moco.temperature
        total -= logits[0] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert abs(loss - total / 16) < 1e-5


def test_keys_of_the_same_patient_are_no_negatives():
    backbone, moco = build_pretext("moco", "test_vit")
    piece = batch(64, patients=[5] * 16)
    moco.owners_64[:] = 5
    assert moco.loss(backbone, moco.views(piece), piece)["loss"].item() == 0.0


def test_the_queue_is_first_in_first_out_per_scale_and_at_most_half_the_corpus():
    backbone, moco = build_pretext("moco", "test_vit")
    assert len(moco.queue_64) == 128  # 512 wanted, half of 256 images allowed
    fresh = moco.queue_32.clone()
    for step in range(9):
        piece = batch(64, epoch=step)
        moco.loss(backbone, moco.views(piece), piece)
        moco.after_step(backbone, step)
    assert torch.equal(moco.queue_32, fresh)
    assert moco.owners_64[:16].tolist() == list(range(8000, 8016))  # the ninth batch took the place of the first
    assert moco.owners_64[16:32].tolist() == list(range(1000, 1016))
    with pytest.raises(CarinaError, match="half of the 20 images"):
        build_pretext("moco", count=20)


def test_the_key_network_follows_by_momentum():
    backbone, moco = build_pretext("moco", "test_vit")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    old = [p.clone() for p in moco.key_backbone.parameters()]
    moco.after_step(backbone, 0)
    m = RECIPE.pretexts.moco.momentum
    for before, after, query in zip(old, moco.key_backbone.parameters(), backbone.parameters()):
        torch.testing.assert_close(after, m * before + (1 - m) * query)
    assert not any(p.requires_grad for p in moco.key_backbone.parameters())


def test_key_statistics_come_from_shuffled_groups():
    """With batch norm a key depends on its group and not on the whole batch, and groups change with the step."""
    _, moco = build_pretext("moco")
    images = torch.rand(16, 1, 64, 64)
    moco.train()
    whole = F.normalize(moco.key_head(moco.key_backbone(images)), dim=1)
    keys, other = moco.keys(images, (0, 1, 0)), moco.keys(images, (0, 2, 0))
    assert not torch.allclose(keys, whole, atol=1e-3) and not torch.allclose(keys, other, atol=1e-3)
    changed = images.clone()
    changed[0] = torch.rand(1, 64, 64)
    moved = (moco.keys(changed, (0, 1, 0)) - keys).abs().amax(dim=1) > 1e-6
    assert moved[0] and moved.sum() == 4, "one changed image moves the keys of its group of four and no others"
    with pytest.raises(CarinaError, match="at least 8 images"):
        build_pretext("moco", micro_batch=4)


def test_a_pretext_of_weight_zero_is_not_built(phantom_store, tmp_path):
    from carina.data.store import select
    from carina.pretrain.run import build_task

    recipe = build("pretrain", PretrainRecipe, "debug/moco", ["batch_size=8"])
    task = build_task(recipe, select(str(phantom_store), rows="train"), 1)
    assert list(task.pretexts) == ["moco"]
    with pytest.raises(CarinaError, match="every pretext has weight 0"):
        build_task(build("pretrain", PretrainRecipe, "default", []), select(str(phantom_store)), 1)
