"""A router trained in seconds on phantoms (and on pictures that are no chests) through the real stages."""

import csv
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.data.store import Store, select
from carina.errors import CarinaError
from carina.files import read_json, write_json
from carina.finetune.run import finetune
from carina.imaging.photometry import Photometry
from carina.imaging.routing import FAMILIAR, by_header, decide
from carina.intake.prepare import prepare
from carina.intake.router import BATCH, Router
from carina.metrics.ranking import auroc

NETWORK = {"backbone": "imagenet-lite0", "size": 64, "mode": "frozen", "threads": 1}


def bones(seed: int) -> np.ndarray:
    """Bright bars on black: nobody's chest."""
    rng = np.random.default_rng(seed)
    image = np.zeros((128, 128), dtype=np.uint8)
    for finger in range(5):
        start = (20 + 22 * finger, 120)
        end = (int(start[0] + rng.integers(-12, 12)), int(rng.integers(10, 50)))
        cv2.line(image, start, end, int(rng.integers(150, 250)), int(rng.integers(5, 10)))
    return image


@pytest.fixture(scope="module")
def routing_store(phantom_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    phantoms = pd.read_csv(phantom_folder / "labels.csv", dtype=str)
    with open(folder / "labels.csv", "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["path", "patient_id", "chest", "PA", "abnormal"])
        for row in phantoms.itertuples():
            shutil.copy(phantom_folder / row.path, folder)
            table.writerow([row.path.split("/")[-1], row.patient_id, 1, int(row.view == "PA"), 0])
        for number in range(40):
            cv2.imwrite(str(folder / f"bones{number}.png"), bones(number))
            table.writerow([f"bones{number}.png", f"bones{number}", 0, "", ""])
    (folder / "key").write_text("splits follow from the key")
    given = {
        "out": str(folder / "store"),
        "key": str(folder / "key"),
        "scales": [32],
        "patient": "patient_id",
        "source": "routing",
    }
    given |= {"labels": ["chest", "PA", "abnormal"], "burned_in": "keep"}
    prepare(str(folder / "labels.csv"), {**given, "synthetic": True, "lungs": False, "workers": 1}, quiet=True)
    return folder / "store"


@pytest.fixture(scope="module")
def routing_run(routing_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "router"
    given = {"store": str(routing_store), "out": str(out), "labels": ["chest", "PA"], **NETWORK}
    finetune("classify", {**given, "probe": {"strengths": [0.1]}}, quiet=True)
    return out


@pytest.fixture(scope="module")
def gate_run(routing_store, tmp_path_factory):
    """What never saw a picture other than chests."""
    out = tmp_path_factory.mktemp("runs") / "gate"
    given = {"store": str(routing_store), "out": str(out), "false_positive_rate": 0.05, **NETWORK}
    finetune("anomaly", given, quiet=True)
    return out


def changed(run, folder, **info):
    """A copy of the run whose predictor.json says something else."""
    shutil.copytree(run / "predictor", folder)
    write_json(folder / "predictor.json", {**read_json(folder / "predictor.json"), **info})
    return str(folder)


def test_a_router_tells_phantoms_from_bones_and_decides(routing_store, routing_run):
    router = Router(str(routing_run))
    assert (router.labels, router.scale, router.geometry.fit) == (("chest", "PA"), 32, "pad")
    rows = select(str(routing_store)).split("val", "test")
    scores = router.scores(rows.images(range(len(rows)), 32))
    chest = rows.targets(["chest"])[:, 0]
    assert len(scores) == len(rows) and set(scores[0]) == {"chest", "PA"}
    assert auroc(chest, np.array([score["chest"] for score in scores])) > 0.99
    nothing = by_header({})
    kept = np.array([decide(nothing, score, "frontal", 0.6).keep for score in scores])
    assert kept[chest == 1].mean() > 0.9 and kept[chest == 0].mean() < 0.1


def test_scores_do_not_depend_on_batches_and_are_the_predictor_s(routing_store, routing_run):
    router, rows = Router(str(routing_run)), select(str(routing_store)).where(np.arange(BATCH + 6))
    images = rows.images(range(len(rows)), 32)
    together = router.scores(images)
    assert router.scores(images[::-1])[::-1] == together
    assert [router.scores(image[None])[0] for image in images[:2]] == together[:2]
    assert router.scores(images[:0]) == []
    from carina.evaluate.score import score_selection
    from carina.models.predictor import load_predictor

    expected = score_selection(load_predictor(routing_run), rows)
    np.testing.assert_allclose([[row["chest"], row["PA"]] for row in together], expected, atol=6e-5)


def test_a_detector_of_chests_alone_tells_what_it_was_never_shown(routing_store, routing_run, gate_run):
    rows = select(str(routing_store)).split("val", "test")
    images, chest = rows.images(range(len(rows)), 32), rows.targets(["chest"])[:, 0]
    both = Router(f"{routing_run},{gate_run}")
    scores = both.scores(images)
    assert both.labels == ("chest", "PA") and set(scores[0]) == {"chest", "PA", FAMILIAR}
    assert [{k: row[k] for k in ("chest", "PA")} for row in scores] == Router(str(routing_run)).scores(images)
    alone = Router(str(gate_run)).scores(images)
    assert [row[FAMILIAR] for row in alone] == [row[FAMILIAR] for row in scores] and set(alone[0]) == {FAMILIAR}
    familiar = np.array([row[FAMILIAR] for row in alone])
    assert familiar[chest == 1].mean() > 0.9 and familiar[chest == 0].mean() < 0.1


def test_prepare_leaves_out_what_the_router_takes_for_something_else(routing_store, routing_run, gate_run, tmp_path):
    folder = routing_store.parent
    given = {"out": str(tmp_path / "store"), "scales": [32], "lungs": False, "workers": 1, "key": str(folder / "key")}
    given |= {"source": "routing", "burned_in": "keep"}
    routed = {"router": f"{routing_run},{gate_run}", "keep": "chest", "reject_below": 0.6}
    prepare(str(folder / "labels.csv"), {**given, **routed, "labels": ["chest"], "patient": "patient_id"}, quiet=True)
    before, after = Store(routing_store).table, Store(tmp_path / "store").table.set_index("image_id")
    scores = Router(routed["router"]).scores(select(str(routing_store)).images(range(len(before)), 32))
    for row, score in zip(before.itertuples(), scores):
        if row.bits > 8:  # DICOM phantoms, for which the header speaks
            assert after.loc[row.image_id, "view_source"] == "header"
            continue
        route = decide(by_header({}), score, "chest", 0.6)
        assert (row.image_id in after.index) == route.keep
        if route.keep:
            kept = after.loc[row.image_id]
            assert (kept["route"], kept["view"], kept["view_source"]) == (route.reason, route.view, route.view_source)
            assert kept["chest"] == np.float32(score["chest"])
    rejected = pd.read_parquet(tmp_path / "store" / "rejected.parquet")["reason"]
    assert len(rejected) == len(before) - len(after) >= 40
    assert set(rejected) <= {
        "the router saw no chest",
        "unlike the chests that the router knows",
        "the router is unsure whether this is a chest",
    }


def test_the_fingerprint_is_of_the_weights_wherever_they_lie(routing_run, gate_run, tmp_path):
    moved = shutil.copytree(routing_run / "predictor", tmp_path / "moved")
    assert Router(str(moved)).fingerprint == Router(str(routing_run)).fingerprint
    assert Router(f"{routing_run},{gate_run}").fingerprint != Router(str(routing_run)).fingerprint


def test_only_images_developed_alike_are_routed(routing_run):
    router = Router(str(routing_run))
    router.check(Photometry())
    router.check(Photometry(frames="first"))
    with pytest.raises(CarinaError, match=r"window=auto, this recipe has window=percentile; give window=auto"):
        router.check(Photometry(window="percentile"))


def test_images_of_another_size_or_kind_are_said(routing_run):
    router = Router(str(routing_run))
    for wrong in (np.zeros((2, 64, 64), np.uint8), np.zeros((2, 32, 32), np.float32), np.zeros((32, 32), np.uint8)):
        with pytest.raises(CarinaError, match=r"reads \(B, 32, 32\) uint8"):
            router.scores(wrong)


def test_what_is_no_router_is_said(routing_run, gate_run, tmp_path):
    with pytest.raises(CarinaError, match="holds no predictor"):
        Router(str(tmp_path))
    with pytest.raises(CarinaError, match="carina finetune classify"):
        Router(changed(routing_run, tmp_path / "segment", kind="segment"))
    with pytest.raises(CarinaError, match="two anomaly detectors"):
        Router(f"{gate_run},{gate_run}")
    with pytest.raises(CarinaError, match="predict 'chest'; give one for each"):
        Router(f"{routing_run},{routing_run}")
    other = changed(gate_run, tmp_path / "geometry", geometry={"fit": "crop"})
    with pytest.raises(CarinaError, match=r"mixes geometry .*'pad'.* and .*'crop'"):
        Router(f"{routing_run},{other}")
    with pytest.raises(CarinaError, match=r"predicts 'Chest' \(did you mean 'chest'\?\).*PA, AP, LATERAL"):
        Router(changed(routing_run, tmp_path / "labels", labels=["Chest", "PA"], stack={"Chest": [1.0], "PA": [1.0]}))
