import json
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from carina.data.batches import in_order
from carina.data.encoding import Encoding
from carina.data.store import Store, read_images, read_masks, select, unit
from carina.errors import CarinaError
from carina.intake import backends
from carina.intake import images as intake_images
from carina.intake.items import Item
from carina.intake.prepare import prepare

STORE_FILES = {"table.parquet", "store.json", "rejected.parquet", "contact.png", "sheet.html"}


def radiograph(seed: int, height: int = 90, width: int = 110) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 6)
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


def folder_of(tmp_path, count=6):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(str(folder / f"p{i // 2}_{i}.png"), radiograph(i))
    return folder


def digest(store) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def test_a_store_holds_exactly_these_files_and_truth(phantom_store, phantom_folder):
    files = {p.relative_to(phantom_store).as_posix() for p in phantom_store.rglob("*") if p.is_file()}
    assert files == STORE_FILES | {f"{k}/{s}/00000.arrow" for k in ("images", "masks") for s in (32, 64)}
    store, truth = Store(phantom_store), pd.read_csv(phantom_folder / "labels.csv", dtype={"patient_id": str})
    assert len(store) == len(truth) and store.table["patient_id"].nunique() == truth["patient_id"].nunique()
    assert not set(store.table["patient_id"]) & set(truth["patient_id"])
    for label in ("Opacity", "Nodule", "Effusion", "Cardiomegaly", "Pneumothorax", "abnormal"):
        assert (store.table[f"label.{label}"] == 1).sum() == (truth[label] == 1).sum()
    assert store.table.groupby("patient_id")["split"].nunique().max() == 1
    rows = range(len(store))
    lungs = read_masks(phantom_store, store.table, rows, 64)
    assert (lungs.mean(axis=(1, 2)) > 0.05).all() and set(store.table["lungs_source"]) == {"file"}
    nodules = read_masks(phantom_store, store.table, rows, 64, "lesion.Nodule").any(axis=(1, 2))
    sick = (store.table["label.Nodule"] == 1).to_numpy()
    assert not nodules[~sick].any() and nodules[sick].mean() > 0.8
    boxes = store.table.loc[nodules, "boxes"]
    assert all(any(b["label"] == "Nodule" and b["x0"] < b["x1"] <= 1 for b in row) for row in boxes)


def test_datasets_reads_the_shards(phantom_store):
    shard = Dataset.from_file(str(phantom_store / "images" / "64" / "00000.arrow"))
    store = Store(phantom_store)
    assert shard[3]["image_id"] == store.table["image_id"][3]
    np.testing.assert_array_equal(
        np.frombuffer(shard[3]["image"], np.uint8).reshape(64, 64), read_images(phantom_store, store.table, [3], 64)[0]
    )


def test_the_same_files_give_the_same_bytes_with_any_number_of_workers(tmp_path):
    folder = folder_of(tmp_path, 40)
    for workers in (1, 2):
        out = str(tmp_path / f"store{workers}")
        prepare(str(folder), {"out": out, "scales": [32], "workers": workers, "patient_regex": r"p\d+"}, quiet=True)
    assert digest(tmp_path / "store1") == digest(tmp_path / "store2")


def test_bad_files_are_counted_listed_and_left_out(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "broken.png").write_bytes((folder / "p0_0.png").read_bytes()[:200])
    (folder / "words.dcm").write_text("no image at all")
    (folder / "notes.txt").write_text("skipped")
    info = prepare(str(folder), {"out": str(tmp_path / "store"), "scales": [32]}, quiet=True)
    assert info["counts"]["images"] == 6 and info["counts"]["rejected"] == 2
    rejected = pq.read_table(tmp_path / "store" / "rejected.parquet").to_pylist()
    assert all(row["reason"] and "broken" not in str(row) and "words" not in str(row) for row in rejected)
    paths = {row["image_id"]: row["path"] for row in pq.read_table(info["paths"]).to_pylist()}
    assert {paths[row["image_id"]].rsplit("/", 1)[1] for row in rejected} == {"broken.png", "words.dcm"}


def test_a_decoder_that_dies_costs_one_file(tmp_path, monkeypatch):
    """The pool is told that its worker died; the file that kills is left out and the others are kept."""

    # Both are local, so that they are sent by value: other processes need not import this file, and torch with it.
    def fatal(items, settings):
        import os
        import signal

        from carina.intake.images import prepare_file

        if any(item.relative.endswith("_3.png") for item in items):
            os.kill(os.getpid(), signal.SIGSEGV)
        return [prepare_file(item, settings) for item in items]

    class Fatal:
        def __init__(self, settings):
            self.settings = settings

        def __call__(self, item):
            return fatal([item], self.settings)[0]

    monkeypatch.setattr(backends, "_in_our_process", fatal)
    monkeypatch.setattr(intake_images, "_One", Fatal)
    folder = folder_of(tmp_path, 40)
    for workers in (1, 2):
        given = {"out": str(tmp_path / f"store{workers}"), "scales": [32], "workers": workers}
        info = prepare(str(folder), given, quiet=True)
        assert info["counts"]["images"] == 39 and info["counts"]["reasons"] == {"its decoder crashed": 1}


def test_a_decoder_that_hangs_costs_its_chunk_some_time_and_no_file(monkeypatch):
    def slow(items, _):
        import time

        from carina.intake.images import Prepared

        if any(item.relative == "21" for item in items):
            time.sleep(60)
        return [Prepared(reason=item.relative) for item in items]

    class Quick:
        def __init__(self, _):
            pass

        def __call__(self, item):
            from carina.intake.images import Prepared

            return Prepared(reason=item.relative)

    monkeypatch.setattr(backends, "_in_our_process", slow)
    monkeypatch.setattr(backends, "CHUNK_SECONDS", 3)
    monkeypatch.setattr(intake_images, "_One", Quick)
    items = [Item(path=str(i), relative=str(i)) for i in range(40)]
    settings = SimpleNamespace(encodings={32: Encoding()})
    with backends.Backend("processes", 2) as backend:
        assert [result.reason for result in backend.results(items, settings)] == [item.relative for item in items]


def test_interrupted_and_given_again_it_continues_to_the_same_bytes(tmp_path, monkeypatch):
    from carina.intake import prepare as module

    monkeypatch.setattr(module, "SHARD_SIZE", 16)
    folder = folder_of(tmp_path, 48)
    given = {"scales": [32], "workers": 1}
    prepare(str(folder), {"out": str(tmp_path / "whole"), **given}, quiet=True)
    calls = []
    original = module._Work._write_shard

    def interrupted(self, shard, backend, progress):
        calls.append(shard)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, shard, backend, progress)

    monkeypatch.setattr(module._Work, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), {"out": str(tmp_path / "again"), **given}, quiet=True)
    with pytest.raises(CarinaError, match="has not finished"):
        Store(tmp_path / "again")
    tables = [pd.read_parquet(p).to_csv() for p in (tmp_path / "again").rglob("*.parquet")]
    assert tables and not any("p0_0" in table for table in tables), "an unfinished store holds no file names either"
    with pytest.raises(CarinaError, match="another recipe"):
        prepare(str(folder), {"out": str(tmp_path / "again"), "scales": [64]}, quiet=True)
    prepare(str(folder), {"out": str(tmp_path / "again"), **given}, quiet=True)
    assert calls == [0, 1, 1, 2], "the first shard was not done again"
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")


def test_killed_in_the_middle_it_continues(tmp_path):
    folder = folder_of(tmp_path, 120)
    words = [
        sys.executable,
        "-m",
        "carina",
        "prepare",
        str(folder),
        f"out={tmp_path / 'store'}",
        "scales=[256]",
        "workers=2",
    ]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (tmp_path / "store" / "plan.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    subprocess.run([*words, "--quiet"], check=True)
    assert len(Store(tmp_path / "store")) == 120


def test_markers_are_taken_out_of_a_store_and_of_what_a_network_is_fed(tmp_path):
    from carina.evaluate.predict import read_files
    from carina.imaging.geometry import Geometry
    from carina.imaging.phantom import phantom
    from carina.imaging.photometry import Photometry

    folder, drawn = tmp_path / "images", [phantom(5, i, 0, 0, size=512) for i in range(6)]
    folder.mkdir()
    for i, picture in enumerate(drawn):
        cv2.imwrite(str(folder / f"{i}.png"), np.uint8(np.round(picture.image * 255)))
    stores = {}
    for markers in ("keep", "inpaint"):
        given = {
            "out": str(tmp_path / markers),
            "scales": [256],
            "markers": markers,
            "workers": 1,
            "patient_regex": r"\d",
        }
        prepare(str(folder), given, quiet=True)
        stores[markers] = select(str(tmp_path / markers))
    before, after = (unit(stores[name].images(range(6), 256)) for name in ("keep", "inpaint"))
    found = stores["inpaint"].table["markers"]
    assert all(value is None for value in stores["keep"].table["markers"]) and sum(len(boxes) for boxes in found) >= 3
    for i, boxes in enumerate(found):
        changed = np.abs(after[i] - before[i]) > 2 / 255
        for box in boxes:
            x0, y0, x1, y1 = (box[name] * 256 for name in ("x0", "y0", "x1", "y1"))
            inside = np.s_[int(y0) - 1 : int(y1) + 2, int(x0) - 1 : int(x1) + 2]
            assert changed[inside].any(), "a letter is gone"
            changed[inside] = False
        assert not changed.any(), "and nothing else"
    photometry = Photometry.from_dict(stores["inpaint"].photometry)
    paths = sorted(str(file) for file in folder.glob("*.png"))
    ((_, fed, _, _),) = read_files(paths, [256], photometry, Geometry())
    names = pq.read_table(tmp_path / "inpaint" / "table.parquet")["image_id"].to_pylist()
    assert len(names) == 6
    np.testing.assert_allclose(np.sort(fed[256][:, 0].sum(dim=(1, 2))), np.sort(after.sum(axis=(1, 2))), rtol=1e-6)
    with pytest.raises(CarinaError, match="differ in photometry"):
        select([str(tmp_path / "keep"), str(tmp_path / "inpaint")])


def test_splits_of_a_csv_are_kept_and_labels_checked(tmp_path):
    folder = folder_of(tmp_path)
    table = pd.DataFrame({"path": sorted(p.name for p in folder.glob("*.png"))})
    table["who"] = [name[:2] for name in table["path"]]
    table["fold"] = ["train", "train", "val", "val", "test", "test"]
    table["Mass"] = ["1", "0", "", "-1", "0", "1"]
    table.to_csv(folder / "labels.csv", index=False)
    given = {"out": str(tmp_path / "store"), "scales": [32], "patient": "who", "split": "fold", "labels": ["Mass"]}
    prepare(str(folder / "labels.csv"), given, quiet=True)
    store = Store(tmp_path / "store")
    assert store.table["split"].tolist() == table["fold"].tolist()
    np.testing.assert_array_equal(store.table["label.Mass"], [1, 0, np.nan, -1, 0, 1])
    for wrong, message in (
        ({"labels": ["Maas"]}, "no column 'Maas'.*did you mean 'Mass'"),
        ({"split": "who"}, "holds 'p0'"),
    ):
        with pytest.raises(CarinaError, match=message):
            prepare(str(folder / "labels.csv"), {**given, "out": str(tmp_path / "other"), **wrong}, quiet=True)


def test_stores_join_under_one_key_only(tmp_path):
    folder = folder_of(tmp_path)
    for name in ("a", "b", "c"):
        for i, file in enumerate(sorted(folder.glob("*.png"))):
            cv2.imwrite(str(file), radiograph(100 * ord(name) + i))
        key = tmp_path / f"key-{'ab' if name in 'ab' else 'c'}"
        key.write_text(f"a secret of some length {key.name}\n")
        given = {"out": str(tmp_path / name), "scales": [32], "key": str(key), "source": name, "patient_regex": r"p\d"}
        prepare(str(folder), given, quiet=True)
    both = select([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(both) == 12
    np.testing.assert_array_equal(both.images([7], 32), select(str(tmp_path / "b")).images([1], 32))
    assert len(select(str(tmp_path / "a"), where="source == 'a' and height > 50")) == 6
    with pytest.raises(CarinaError, match="different keys"):
        select([str(tmp_path / "a"), str(tmp_path / "c")])
    key = str(tmp_path / "key-ab")
    prepare(str(folder), {"out": str(tmp_path / "d"), "scales": [32], "key": key, "source": "d"}, quiet=True)
    prepare(str(folder), {"out": str(tmp_path / "e"), "scales": [32], "key": key, "source": "e"}, quiet=True)
    with pytest.raises(CarinaError, match="images of these stores together stand in more than one split"):
        select([str(tmp_path / "d"), str(tmp_path / "e")])
    assert len(select([str(tmp_path / "d"), str(tmp_path / "e")], where="source == 'd'")) == 6
    with pytest.raises(CarinaError, match="no row meets"):
        select(str(tmp_path / "a"), where="view == 'PA'")


@pytest.mark.real
def test_real_radiographs_with_human_masks(real_data, tmp_path):
    table = pd.read_csv(real_data / "kermany" / "labels.csv", dtype=str, keep_default_na=False)
    part = table[table["lung_mask"] != ""].iloc[::40].copy()
    for column in ("path", "lung_mask"):
        part[column] = [str(real_data / "kermany" / name) for name in part[column]]
    part.to_csv(tmp_path / "part.csv", index=False)
    given = {"out": str(tmp_path / "store"), "scales": [64, 128], "patient": "patient_id", "view": "view"}
    given |= {"mask": "lung_mask", "labels": ["abnormal"], "split": "suggested_split", "source": "kermany"}
    info = prepare(str(tmp_path / "part.csv"), given, quiet=True)
    assert info["counts"]["images"] == len(part) and info["counts"]["lungs_source"] == {"file": len(part)}
    masks = read_masks(tmp_path / "store", Store(tmp_path / "store").table, range(len(part)), 128)
    assert (masks.mean(axis=(1, 2)) > 0.08).all()


@pytest.mark.real
def test_every_shared_dicom_file_is_kept_or_rejected_with_a_reason(real_data, tmp_path):
    for keep in ("all", "frontal"):
        out = tmp_path / keep
        given = {"out": str(out), "scales": [64], "workers": 1, "keep": keep, "duplicates": False}
        info = prepare(str(real_data / "dicom"), given, quiet=True)
        counts = info["counts"]
        assert counts["images"] + counts["rejected"] == 21 and sum(counts["reasons"].values()) == counts["rejected"]
        assert json.loads((out / "store.json").read_text())["counts"] == counts
        if keep == "all":
            assert counts["images"] >= 19
    hips = pd.read_csv(real_data / "dicom" / "labels.csv", dtype=str).query("body_part_examined_tag == 'HIP'")
    assert counts["rejected"] >= len(hips) and any("HIP" in reason for reason in counts["reasons"])


@pytest.mark.parametrize(("encoding", "bits"), [("png", 16), ("raw", 16), ("png", 8), ("jpeg", 8)])
def test_every_encoding_holds_the_same_picture(tmp_path, encoding, bits):
    folder = folder_of(tmp_path)
    given = {"scales": [64, 32], "workers": 1}
    prepare(str(folder), {**given, "out": str(tmp_path / "plain")}, quiet=True)
    form = {"encoding": {64: encoding}, "bits": {64: bits}}
    prepare(str(folder), {**given, "out": str(tmp_path / "other"), **form}, quiet=True)
    plain, other = select(str(tmp_path / "plain")), select(str(tmp_path / "other"))
    assert plain.hashes == other.hashes, "an image has one content hash, however it is kept"
    images = other.images(range(6), 64)
    assert images.dtype == (np.uint16 if bits == 16 else np.uint8)
    level = 1 / 255 if encoding != "jpeg" else 0.1
    np.testing.assert_allclose(unit(images), unit(plain.images(range(6), 64)), atol=level)
    np.testing.assert_array_equal(other.images(range(6), 32), plain.images(range(6), 32))
    both = select([str(tmp_path / "plain"), str(tmp_path / "other")])
    assert len(both) == 6
    batches = list(in_order(other, 64, torch.device("cpu"), batch_size=4))
    np.testing.assert_allclose(torch.cat([b for _, b in batches])[:, 0].numpy(), unit(images), atol=1e-7)


def test_a_dry_run_tells_disk_and_time_and_writes_nothing(tmp_path, carina):
    folder = folder_of(tmp_path, 20)
    out = tmp_path / "store"
    found = json.loads(carina("prepare", folder, f"out={out}", "scales=[256,64]", "--dry-run", "--json").stdout)
    assert found["files"] == 20 and found["seconds"] > 0 and not out.exists()
    prepare(str(folder), {"out": str(out), "scales": [256, 64]}, quiet=True)
    written = sum(p.stat().st_size for p in out.rglob("*.arrow")) + (out / "table.parquet").stat().st_size
    assert 0.8 < written / found["bytes"] < 1.25


def test_a_store_that_would_not_fit_is_refused_before_the_work(tmp_path, monkeypatch):
    from carina.intake import estimate
    from carina.intake import prepare as module

    folder = folder_of(tmp_path, 10)
    monkeypatch.setattr(module, "WORTH_IT", 5)
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 100_000)
    with pytest.raises(CarinaError, match=r"would take about .* 100 kB left"):
        prepare(str(folder), {"out": str(tmp_path / "store"), "scales": [256]}, quiet=True)
    assert not (tmp_path / "store").exists()


def test_lateral_views_and_copies_do_what_the_recipe_says(tmp_path):
    folder = folder_of(tmp_path, 8)
    names = sorted(p.name for p in folder.glob("*.png"))
    cv2.imwrite(str(folder / "q_9.png"), cv2.imread(str(folder / names[0]), cv2.IMREAD_GRAYSCALE))
    table = pd.DataFrame({"path": [*names, "q_9.png"], "who": [n[:2] for n in names] + ["q"]})
    table["view"] = ["PA", "AP", "LATERAL", "LL", "", "PA", "PA", "PA", "PA"]
    table.to_csv(folder / "labels.csv", index=False)
    given = {"scales": [32], "patient": "who", "view": "view", "workers": 1}
    info = prepare(str(folder / "labels.csv"), {**given, "out": str(tmp_path / "frontal")}, quiet=True)
    assert info["counts"]["images"] == 7 and info["counts"]["view"] == {"AP": 1, "PA": 5, "unknown": 1}
    assert info["counts"]["duplicates"] == 2
    frame = Store(tmp_path / "frontal").table
    twins = frame[frame["duplicates"] != ""]
    assert twins["split"].nunique() == 1 and twins["patient_id"].nunique() == 2
    info = prepare(str(folder / "labels.csv"), {**given, "out": str(tmp_path / "all"), "keep": "all"}, quiet=True)
    assert info["counts"]["images"] == 9 and info["counts"]["view"]["LATERAL"] == 2
