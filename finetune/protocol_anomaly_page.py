"""How the tables of an anomaly protocol are shown: as a page of Markdown, and on a terminal."""

from __future__ import annotations

from typing import Any

from carina.finetune.protocol_page import Grid, figure, number, pages, tables
from carina.metrics.ranking import BELOW_CHANCE


def below(found: dict[str, Any]) -> bool:
    return found["high"] is not None and found["estimable"] and found["high"] < 0.5


def words(entry: dict[str, Any]) -> str:
    return f"{entry['arm']} ({entry['checkpoint']}, {entry['scorer']}, {entry['region']})"


HEADS = ["arm", "checkpoint", "scorer", "region", "AUROC", "AP", "FPR at 95 % TPR", "nominal 5 %", "shift", "pretext saw",
         "labels used", "seeds"]  # fmt: skip


def both(row: dict[str, Any], name: str) -> str:
    """A figure against cross-fitted training normals and, in parentheses, against held-out ones."""
    held_out = row.get(f"{name}_held_out")
    return number(row.get(name)) + (f" ({number(held_out)})" if held_out is not None else "")


def cells_of(row: dict[str, Any]) -> list[str]:
    """The columns of HEADS."""
    saw = row["pretext_saw"] + (f", then {row['finetune_saw']}" if row["finetune_saw"] else "")
    saw += " (transductive)" if row["transductive"] else ""
    steps = sorted(set(row["steps"]) - {0})
    checkpoint = row["checkpoint"] + (f", step {'/'.join(map(str, steps))}" if steps else "")
    checkpoint += "" if row["informative"] else ", not informative"
    return [
        row["arm"] + (" **primary**" if row["primary"] else ""),
        f"{checkpoint}" if row["mode"] == "frozen" else f"full, {checkpoint}",
        row["scorer"],
        row["region"],
        figure(row["auroc"]),
        number(row["average_precision"]),
        number(row["fpr_at_95_tpr"]),
        both(row, "fpr_nominal"),
        both(row, "shift"),
        saw,
        row["labels_used"],
        str(row["seeds"]),
    ]


def control_cells(row: dict[str, Any]) -> list[str]:
    first = [f"control: {row['control']}", "", row["method"], ""]
    if row.get("missing"):
        return [*first, row["missing"], *["-"] * 4, "", "", ""]
    figures = [figure(row["auroc"]), number(row["average_precision"]), number(row["fpr_at_95_tpr"]), "-", "-"]
    return [*first, *figures, "nothing", "the normal flag", "1"]


def grids(result: dict[str, Any]) -> list[Grid]:
    """Every table in the order in which they are read."""
    found: list[Grid] = []
    for table in result["tables"]:
        title = f"{result['title']}: {table['set']}"
        rows = [cells_of(row) for row in table["rows"]] + [control_cells(row) for row in table["controls"]]
        heads = HEADS
        if table["counts"]["folds"]:
            heads = [*HEADS, "within folds"]
            inside = [number(row.get("auroc_within_folds")) for row in table["rows"] + table["controls"]]
            rows = [[*row, value] for row, value in zip(rows, inside)]
        found.append((title, heads, rows, notes(result, table)))
        rows = [
            [row["row"], *(figure(row[part]) for part in ("lungs", "background")), figure(row["difference"], "+"),
             "yes" if row["claims_lesions"] else "no"]
            for row in table["lungs_minus_background"]
        ]  # fmt: skip
        if rows:
            heads = ["row", "lungs only", "background only", "lungs - background", "claims lesions"]
            said = [row["sentence"] for row in table["lungs_minus_background"] if row["sentence"]]
            said.append("Lesions are claimed where lungs only beat background only, and chance, by their intervals.")
            found.append((f"{title}, lungs and background", heads, rows, said))
        rows = [
            [row["arm"], row["checkpoint"], row["scorer"], f"{row['share'] * 100:g} %", figure(row["auroc"]),
             figure(row["clean"]), figure(row["difference"], "+"), str(row["seeds"])]
            for row in table["contamination"]
        ]  # fmt: skip
        if rows:
            heads = ["arm", "checkpoint", "scorer", "abnormal", "AUROC", "AUROC without", "difference", "seeds"]
            said = ["Shares of abnormal images among the training normals; whole images, last epoch, the same seeds."]
            found.append((f"{title}, contaminated normals", heads, rows, said))
    if result["published"]:
        rows = [[row["method"], f"{row['auroc']:.3f}", row["source"]] for row in result["published"]]
        said = ["As their authors report them on these rows; none was run here."]
        found.append((f"{result['title']}: published figures", ["method", "AUROC", "source"], rows, said))
    return found


def notes(result: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What must be read with a table."""
    counts, cells = table["counts"], table["cells"]
    share = counts["test_abnormal"] / (counts["test_abnormal"] + counts["test_normal"])
    trained = f"{counts['train_normal']} normal images to train on; tested on"
    if counts["folds"]:
        trained = (
            f"{counts['folds']} patient folds, each tested after training on the normal images of the others, pooled:"
        )
    found = [
        ("Synthetic images. " if result["synthetic"] else "")
        + f"{trained} {counts['test_normal']} normal and {counts['test_abnormal']} abnormal images of "
        f"{counts['test_patients']} patients (chance: AUROC 0.5, AP {share:.3f}). 95 % intervals: patients and seeds "
        f"resampled {result['resamples']} times. Nominal 5 %: the share of test normals above the threshold that 5 % of the "
        "cross-fitted training normals exceed; shift: AUROC of test normals against those; in parentheses the same with "
        "held-out normals."
    ]
    if counts["folds"]:
        found.append("Within folds: the mean AUROC inside a fold, where scores of different fits do not meet.")
    if cells["done"] < cells["asked"]:
        found.append(f"Not finished: {cells['done']} of {cells['asked']} cells are done.")
    if table["primary"]:
        found.append(table["primary"]["sentence"])
    if table["below_chance"]:
        found.append(f"Below chance: {'; '.join(table['below_chance'])}. {BELOW_CHANCE[0].upper()}{BELOW_CHANCE[1:]}.")
    return found


def markdown(result: dict[str, Any]) -> str:
    return pages(result, grids(result))


def terminal(result: dict[str, Any]) -> Any:
    return tables(result, grids(result))
