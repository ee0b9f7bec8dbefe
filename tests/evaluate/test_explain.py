"""Heat maps: each method against what it must give by its definition, and what training does to them."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from carina.errors import CarinaError
from carina.evaluate.explain import METHODS, heat_maps, integrated_gradients, rollout, sanity
from carina.metrics.localization import pointing_game
from carina.models.backbones import Backbone, Spec, random_backbone, seeded
from carina.models.heads import HeadSettings, make_head
from carina.models.predictor import Member


def member_of(backbone, head="linear", region="whole", labels=("Nodule", "Effusion")):
    settings = HeadSettings(name=head, hidden=8, dropout=0.0, layers=None, sharpness=5.0, noisy_or=False)
    return Member(backbone, backbone.spec.size, make_head(settings, backbone, list(labels), 0), None, region).eval()


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).random((3, 1, 64, 64), np.float32))


def test_integrated_gradients_are_the_whole_difference_of_the_score(images):
    """Completeness (Sundararajan et al., ICML 2017), from the gray picture at the mean of what is shown."""
    member = member_of(random_backbone("test_vit", 64, 0))
    shown = images * (torch.arange(64) < 40)  # what is black carries nothing when a region is all that counts
    for region, given, baseline in (
        ("whole", images, images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images)),
        ("lungs", shown, shown.sum(dim=(1, 2, 3), keepdim=True) / (64 * 40) * (shown > 0)),
    ):
        member.region = region
        found = integrated_gradients(member, given, 1)
        with torch.no_grad():
            difference = (member.logits(given) - member.logits(baseline.contiguous()))[:, 1]
        torch.testing.assert_close(found.sum(dim=(1, 2, 3)), difference, atol=2e-3, rtol=2e-2)
    assert found[..., 40:].abs().max() == 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_multiplies_attention_through_the_blocks(images, pool):
    """Against attention computed anew from the weights of every block."""
    backbone = random_backbone("test_vit", 64, 0)
    network = timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=64, global_pool=pool)
    member = member_of(Backbone(network.eval(), backbone.spec))
    flow = torch.eye(network.patch_embed.num_patches + network.num_prefix_tokens)
    with torch.no_grad():
        x = network._pos_embed(network.patch_embed(member.backbone.normalize(images)))
        for block in network.blocks:
            layer, given = block.attn, block.norm1(x)
            split = layer.qkv(given).reshape(*given.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
            attention = (split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)
            flow = 0.5 * (attention + torch.eye(attention.shape[-1])) @ flow
            x = block(x)
    rows = flow[:, 0] if pool == "token" else flow[:, network.num_prefix_tokens :].mean(dim=1)
    patches = rows[:, network.num_prefix_tokens :]
    expected = F.interpolate(
        (patches - patches.amin(dim=1, keepdim=True)).view(3, 1, 4, 4), (64, 64), mode="bilinear", align_corners=False
    )
    fused = [block.attn.fused_attn for block in network.blocks]
    torch.testing.assert_close(rollout(member, images, 0), expected[:, 0], atol=1e-5, rtol=1e-3)
    assert [block.attn.fused_attn for block in network.blocks] == fused
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in network.blocks)


def test_rollout_knows_the_label_through_the_heads_own_attention(images):
    member = member_of(random_backbone("test_vit", 64, 0), "attentive")
    with torch.no_grad():
        member.head.queries.normal_(0, 20, generator=torch.Generator().manual_seed(0))
    assert not np.allclose(
        heat_maps(member, images, 0, method="rollout"), heat_maps(member, images, 1, method="rollout")
    )
    plain = member_of(random_backbone("test_vit", 64, 0))
    np.testing.assert_array_equal(*(heat_maps(plain, images, column, method="rollout") for column in (0, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_of_image_size_between_0_and_1(images, method):
    maps = heat_maps(member_of(random_backbone("test_vit", 32, 0)), images, 1, method=method)
    assert maps.shape == (3, 64, 64) and maps.dtype == np.float32
    assert maps.min() >= 0 and maps.max() <= 1 and set(maps.max(axis=(1, 2))) <= {0.0, 1.0}


def test_mistakes_are_sentences(images):
    member = member_of(random_backbone("test_resnet", 64, 0))
    with pytest.raises(CarinaError, match="plain vision transformers, and test_resnet is none"):
        heat_maps(member, images, 0, method="rollout")
    with pytest.raises(CarinaError, match="did you mean 'gradcam'"):
        heat_maps(member, images, 0, method="grad_cam")


@pytest.fixture(scope="module")
def spotted():
    """A network trained to find an upright grating among three that are turned, against four that are turned, all equally
    strong; test images with an upright one, and its place. A network that has learned nothing has no reason to choose it."""
    rng = np.random.default_rng(1)
    count, side = 320, 48
    y, x = np.mgrid[:side, :side]
    pixels, upright = 0.5 + 0.05 * rng.normal(size=(count, side, side)), np.zeros((count, side, side))
    sick = np.arange(count) % 2 == 1
    for number in range(count):
        quarters = rng.permutation(4)
        for which, angle in enumerate((0 if sick[number] else rng.integers(1, 4), 1, 2, 3)):
            row, column = 12 + 24 * np.array(divmod(quarters[which], 2)) + rng.uniform(-4, 4, 2)
            spot = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 3.5**2))
            along = x * np.cos(angle * np.pi / 4) + y * np.sin(angle * np.pi / 4)
            pixels[number] += 0.4 * spot * np.cos(along * np.pi / 2)
            upright[number] += spot * (which == 0)
    pictures = torch.from_numpy(pixels.clip(0, 1).astype(np.float32))[:, None]
    target = torch.from_numpy(sick.astype(np.float32))
    args = {"in_chans": 1, "block_config": (4,), "growth_rate": 12}
    with seeded(0, "gratings"):
        network = timm.create_model("densenet121", num_classes=0, **args)
        spec = Spec("densenet121", 1, side, (0.5,), (0.1,), args)
        member = member_of(Backbone(network, spec), head="lse", labels=("Nodule",))
    train, test = slice(0, 240), slice(240, None)
    member.train()
    optimizer = torch.optim.AdamW(member.parameters(), lr=5e-3)
    for step in range(70):
        rows = torch.arange(32) + 32 * step
        rows = rows % 240
        loss = F.binary_cross_entropy_with_logits(member.logits(pictures[train][rows])[:, 0], target[train][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    member.eval()
    return member, pictures[test][sick[test]], upright[test][sick[test]] > 0.2


def test_trained_maps_point_at_the_lesion_and_randomized_ones_do_not(spotted):
    member, pictures, places = spotted
    before = [value.clone() for value in member.state_dict().values()]
    draws = [sanity(member, pictures, 0, seed=seed) for seed in range(6)]
    assert [row["randomized"] for row in draws[0][:2]] == ["nothing", "head"]
    assert pointing_game(draws[0][0]["maps"], places).mean() >= 0.7
    random = np.mean([pointing_game(steps[-1]["maps"], places).mean() for steps in draws])
    similarity = np.mean([steps[-1]["similarity"] for steps in draws])
    assert random < 0.4 and abs(similarity) < 0.4, (random, similarity)
    assert all(torch.equal(a, b) for a, b in zip(before, member.state_dict().values()))
    again = sanity(member, pictures[:4], 0)
    np.testing.assert_array_equal(sanity(member, pictures[:4], 0)[-1]["maps"], again[-1]["maps"])


def test_predict_holds_models_beside_each_other(
    pretrained, phantom_store, phantom_folder, tmp_path, capsys, monkeypatch
):
    from carina.cli import main
    from carina.evaluate import predict
    from carina.finetune.run import finetune

    monkeypatch.setattr(predict, "isolated", lambda reader, paths: ((reader(path), "") for path in paths))
    given = {"store": str(phantom_store), "backbone": str(pretrained), "labels": ["Effusion"], "threads": 1}
    for name, scale in (("a", 64), ("b", 32)):
        finetune("classify", {**given, "scale": scale, "out": str(tmp_path / name)}, quiet=True)
    paths = sorted(str(path) for path in (phantom_folder / "images").iterdir())[:2]
    maps = tmp_path / "maps"
    words = ["predict", str(tmp_path / "a"), *paths, "--json", "--quiet"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)["predictions"]
    assert main([*words, f"--maps={maps}", f"--beside={tmp_path / 'b'}", "--method=integrated_gradients"]) == 0
    told = json.loads(capsys.readouterr().out)["predictions"]
    for row, other in zip(told, alone):
        assert row["scores"] == other["scores"] and "agreement" not in other
        assert set(row["agreement"]["Effusion"]) == {"spearman", "iou", "kappa"}
        assert -1 <= row["agreement"]["Effusion"]["spearman"] <= 1
    assert len(list(maps.glob("*-Effusion.png"))) == len(list(maps.glob("*-Effusion-agreement.png"))) == 2
    same = ["predict", str(tmp_path / "a"), paths[0], f"--maps={maps}", f"--beside={tmp_path / 'a'}"]
    assert main([*same, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["agreement"]["Effusion"] == pytest.approx(
        {"spearman": 1, "iou": 1, "kappa": 1}
    )
    assert main([*words, "--method=gradcam"]) == 2 and "need a folder" in capsys.readouterr().err
    assert main([*same, "--method=rollout"]) == 2 and "plain vision transformers" in capsys.readouterr().err
