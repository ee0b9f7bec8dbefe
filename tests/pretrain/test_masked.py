"""MAE and SimMIM: what is hidden, what is predicted, and what the error counts."""

import math

import numpy as np
import pytest
import timm
import torch

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import Backbone, Spec, random_backbone
from carina.pretrain.pretexts import Corpus, method
from carina.pretrain.pretexts.masking import explained, places
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

RECIPE = build("pretrain", PretrainRecipe, "default", {"pretexts": {"mae": {"width": 32, "depth": 1, "heads": 2}}})


def swin(size=64):
    args = dict(img_size=size, in_chans=1, num_classes=0, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    torch.manual_seed(0)
    return Backbone(timm.models.SwinTransformer(**args, window_size=4), Spec("swin", size=size))


def vit(size=64, **args):
    given = dict(img_size=size, patch_size=16, in_chans=1, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    torch.manual_seed(0)
    return Backbone(timm.models.VisionTransformer(**given, dynamic_img_size=True, **args), Spec("vit", size=size))


def batch(size, count=4, epoch=0):
    codes = torch.arange(count)
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(epoch))
    draws = Draws(0, epoch, codes.numpy().astype(np.uint64))
    return Batch(images, None, {"image": codes, "study": codes, "patient": codes}, None, draws, size, (0, epoch, 0))


def build_pretext(name, backbone, settings=None, **changes):
    given = dict(count=64, batch_size=4, micro_batch=4, size=None, views=RECIPE.views, seed=0, steps=10)
    settings = getattr(RECIPE.pretexts, name).model_copy(update=settings or {})
    return method(name)(backbone, settings, Corpus(**{"scales": (backbone.spec.size,), **given, **changes})).eval()


def squares(images, side):
    """(B, S, S) array -> (B, N, side, side), row by row."""
    rows = range(0, images.shape[1], side)
    return np.stack([images[:, y : y + side, x : x + side] for y in rows for x in rows], axis=1)


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_by_hand_on_two_by_two_patches(normalize):
    backbone = random_backbone("test_vit", 32, 0).eval()
    mae = build_pretext("mae", backbone, {"normalize": normalize})
    piece = batch(32)
    (images,) = mae.views(piece)
    order = np.argsort(piece.draws.part("mae mask").uniform("order", shape=(4,)), axis=1)
    seen = order[:, 0]  # three quarters of four are hidden
    network, decoder = backbone.network, mae.decoder
    pixels = (squares(images[:, 0].numpy(), 16) - backbone.spec.mean[0]) / backbone.spec.std[0]
    with torch.no_grad():
        kernel, bias = network.patch_embed.proj.weight.flatten(1), network.patch_embed.proj.bias
        tokens = torch.from_numpy(pixels).flatten(2) @ kernel.T + bias + network.pos_embed[:, 1:]
        first = (network.cls_token + network.pos_embed[:, :1]).expand(4, -1, -1)
        kept = torch.stack([tokens[i, [seen[i]]] for i in range(4)])
        encoded = decoder.embed(network.norm(network.blocks(torch.cat([first, kept], dim=1))))
        full = decoder.mask_token.repeat(4, 4, 1)
        for i in range(4):
            full[i, seen[i]] = encoded[i, 1]
        for place, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            waves = [
                [math.sin, math.cos][k // 8](at * 10000 ** -(k % 8 / 8)) for at in (row, column) for k in range(16)
            ]
            full[:, place] += torch.tensor(waves)
        predicted = decoder.pixels(decoder.norm(decoder.blocks(torch.cat([encoded[:, :1], full], dim=1)))).numpy()[
            :, 1:
        ]
        out = mae.loss(backbone, (images,), piece)
    target = pixels.reshape(4, 4, 256)
    if normalize:
        target = (target - target.mean(2, keepdims=True)) / np.sqrt(target.var(2, ddof=1, keepdims=True) + 1e-6)
    hidden = [(i, place) for i in range(4) for place in range(4) if place != seen[i]]
    error = np.mean([((predicted[at] - target[at]) ** 2).mean() for at in hidden])
    assert abs(out["loss"].item() - error) < 1e-5
    base = np.mean([(target[at] - np.mean([target[at] for at in hidden])) ** 2 for at in hidden])
    assert abs(out["explained"].item() - (1 - error / base)) < 1e-5


def test_mae_never_sees_hidden_patches_and_is_judged_on_them_alone():
    backbone = random_backbone("test_vit", 64, 0).eval()
    mae = build_pretext("mae", backbone, scales=(32, 64))
    made = []
    mae.decoder.register_forward_hook(lambda module, inputs, output: output.retain_grad() or made.append(output))
    piece = batch(64)
    (images,) = mae.views(piece)
    mae.loss(backbone, (images,), piece)["loss"].backward()
    judged = made[0].grad.abs().amax(dim=2) > 0
    assert judged.sum(dim=1).tolist() == [12] * 4, "three quarters of sixteen patches"
    assert (judged[0] != judged[1]).any(), "every sample has its own mask"
    pixels = judged.unflatten(1, (1, 4, 4)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    mae.loss(backbone, (torch.where(pixels, 1 - images, images),), piece)
    assert torch.equal(made[0], made[1])
    mae.loss(backbone, (torch.where(pixels, images, 1 - images),), piece)
    assert not torch.allclose(made[0], made[2], atol=1e-3)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_masks_are_the_sample_s_own_and_survive_a_state_round_trip(name):
    backbone = random_backbone("test_vit", 64, 0).eval()
    pretext, again = (build_pretext(name, backbone, seed=seed) for seed in (0, 1))
    again.load_state_dict(pretext.state_dict())
    piece, later = batch(64), batch(64, epoch=1)
    loss = [p.loss(backbone, p.views(piece), piece)["loss"] for p in (pretext, again)]
    assert torch.equal(*loss)
    later.images = piece.images
    assert not torch.equal(loss[0], pretext.loss(backbone, pretext.views(piece), later)["loss"])
    singles = []
    for i in range(4):
        one = Batch(piece.images[i : i + 1], None, {}, None, piece.draws.select(np.array([i])), 64, (0, 9, 0))
        singles.append(pretext.loss(backbone, pretext.views(one), one)["loss"])
    torch.testing.assert_close(torch.stack(singles).mean(), loss[0], atol=1e-5, rtol=0)


def simmim_features(backbone, images, mask, token):
    """Features of every place, from the networks' parts; mask (B, n, n) bool in units of the patch or of the image."""
    network = backbone.network
    normalized = (images - backbone.spec.mean[0]) / backbone.spec.std[0]
    if backbone.family == "cnn":
        return network.forward_features(normalized * ~mask[:, None])
    x = network.patch_embed(normalized).clone()
    x[mask] = token
    if backbone.family == "swin":
        return network.norm(network.layers(x)).permute(0, 3, 1, 2)
    tokens = network.norm(network.blocks(network._pos_embed(x)))
    return (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize(("make", "cell", "stride"), [("test_resnet", 32, 32), ("test_vit", 16, 16), (swin, 32, 32)])
def test_simmim_equals_its_definition(make, cell, stride):
    backbone = (make() if callable(make) else random_backbone(make, 64, 0)).eval()
    simmim = build_pretext("simmim", backbone)
    piece = batch(64)
    (images,) = simmim.views(piece)
    side = 64 // cell
    order = np.argsort(piece.draws.part("simmim mask").uniform("order", shape=(side * side,)), axis=1)
    hidden = np.zeros((4, 64, 64), dtype=bool)
    for i in range(4):
        for place in order[i, : round(0.6 * side * side)]:
            y, x = place // side * cell, place % side * cell
            hidden[i, y : y + cell, x : x + cell] = True
    mask = torch.from_numpy(hidden)
    with torch.no_grad():
        token = getattr(simmim, "mask_token", None)
        features = simmim_features(backbone, images, mask[:, :: backbone.patch, :: backbone.patch], token)
        weight = simmim.decoder.weight.double().numpy()[:, :, 0, 0]
        values = np.einsum("bdhw,pd->bhwp", features.double().numpy(), weight) + simmim.decoder.bias.numpy()
        loss = simmim.loss(backbone, (images,), piece)["loss"].item()
    count = values.shape[1]
    picture = values.reshape(4, count, count, stride, stride).transpose(0, 1, 3, 2, 4).reshape(4, 64, 64)
    target = (images[:, 0].double().numpy() - backbone.spec.mean[0]) / backbone.spec.std[0]
    expected = np.mean([np.abs(picture[i] - target[i])[hidden[i]].mean() for i in range(4)])
    assert abs(loss - expected) < 1e-5


def test_simmim_hides_the_same_share_of_the_side_at_every_scale():
    simmim = build_pretext("simmim", random_backbone("test_vit", 64, 0), scales=(32, 64, 192, 384))
    assert [simmim.cell(size, 16) for size in (32, 64, 192, 384)] == [16, 16, 32, 64]
    simmim = build_pretext("simmim", random_backbone("test_resnet", 64, 0), scales=(32, 80))
    hidden = simmim.hidden(batch(80), 80, 1)
    assert hidden.shape == (4, 1, 80, 80) and 0 < hidden.float().mean() < 1
    assert simmim.cell(32, 1) == 16, "one stride would hide all or nothing"


@pytest.mark.parametrize(
    "make",
    ["test_resnet", "test_convnext", "mobilenetv3_small_050", swin, vit, lambda: vit(global_pool="avg")],
    ids=["resnet", "convnext", "mobilenet", "swin", "vit", "vit-mean"],
)
def test_every_weight_of_what_is_exported_is_trained(make):
    """Also those behind the pooling, or DDP would wait for their gradients for ever."""
    backbone = make() if callable(make) else random_backbone(make, 64, 0)
    for name in ("simmim", "mae") if backbone.family == "vit" else ("simmim",):
        backbone.zero_grad()
        pretext, piece = build_pretext(name, backbone), batch(64)
        pretext.loss(backbone, pretext.views(piece), piece)["loss"].backward()
        assert [key for key, p in [*backbone.named_parameters(), *pretext.named_parameters()] if p.grad is None] == []


def test_a_picture_of_one_place_is_pooled_as_that_place():
    images = torch.rand(2, 1, 32, 32)
    for name in ("test_resnet", "test_convnext", "mobilenetv3_small_050"):
        backbone = random_backbone(name, 32, 0).eval()
        torch.testing.assert_close(places(backbone, images)[:, :, 0, 0], backbone(images), atol=1e-5, rtol=0)
    backbone = vit(global_pool="avg").eval()
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(places(backbone, images)[:, :, 0, 0], backbone(images), atol=1e-5, rtol=0)


def test_explained_is_none_for_the_mean_and_all_for_the_truth():
    target, hidden = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8) < 0.5
    for power in (1, 2):
        error = ((target - target[hidden].mean()).abs() ** power)[hidden].mean()
        assert abs(explained(error, target, hidden, power)) < 1e-5
        assert explained(torch.tensor(0.0), target, hidden, power) == 1


@pytest.mark.parametrize(
    ("name", "make", "changes", "message"),
    [
        ("mae", lambda: random_backbone("test_resnet", 64, 0), {}, "mae drops patches.*architecture=vit_small"),
        ("mae", swin, {}, "or take pretexts.simmim"),
        ("mae", lambda: vit(global_pool="map"), {}, "untrained; take a transformer that pools"),
        ("simmim", lambda: vit(global_pool="map"), {}, "untrained; take a transformer that pools"),
        ("simmim", lambda: random_backbone("mixer_s32_224", 64, 0), {}, "needs features with places"),
        ("mae", vit, {"scales": (64, 40)}, "patches of 16 px in images of 40 px; give size= or scales="),
        ("mae", vit, {"settings": {"width": 36, "heads": 8}}, "give pretexts.mae.width=64"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(name, make, changes, message):
    with pytest.raises(CarinaError, match=message):
        build_pretext(name, make(), **changes)
