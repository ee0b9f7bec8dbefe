"""How the table of few labels is shown: Markdown, a terminal, and one figure of label-efficiency curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from carina.files import atomic_path
from carina.finetune.protocol_page import Grid, figure, number, pages, tables

HEADS = ["mode", "patients", "arm", "AUROC", "AP", "draws", "labels used", "pretext saw", "test seen before"]
OVERALL = "overall"
TICKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # of the figure


def cells_of(row: dict[str, Any]) -> list[str]:
    seen = "unknown" if row["seen_patients"] is None else str(row["seen_patients"] or "none")
    labels = row["labels_used"] + (f" (one class only in {row['one_class']} fits)" if row["one_class"] else "")
    return [
        row["mode"],
        row["patients"],
        row["arm"],
        figure(row["auroc"]),
        number(row.get("average_precision")),
        str(row["draws"]),
        labels,
        row["pretext_saw"],
        seen + (" (transductive)" if row["transductive"] else ""),
    ]


def pair(entry: dict[str, Any]) -> str:
    ours, theirs = entry["row"], entry["reference"]
    return f"{ours['arm']} - {theirs['arm']} ({ours['mode']})"


def grids(result: dict[str, Any], short: bool = False) -> list[Grid]:
    """Every table in the order in which they are read. short: of several labels the first, and their mean, alone."""
    found: list[Grid] = []
    for table in result["tables"]:
        title = f"{result['title']}: {table['set']}"
        groups = list(dict.fromkeys((row["label"], row["group"]) for row in table["rows"]))
        if short:
            ends = (table["labels"][0], groups[-1][0] if groups else "")
            groups = [(label, group) for label, group in groups if label in ends]
        for place, (label, group) in enumerate(groups):
            rows = [cells_of(row) for row in table["rows"] if (row["label"], row["group"]) == (label, group)]
            where = "" if group == OVERALL else f", {group}"
            found.append((f"{title}, {label}{where}", HEADS, rows, notes(result, table) if not place else []))
        rows = [
            [pair(entry), entry["patients"], figure(entry["difference"], "+"), p(entry["difference"]["p_value"]),
             p(entry["p_holm"]), str(entry["draws"])]
            for entry in table["exploratory"]
        ]  # fmt: skip
        if rows:
            said = [
                f"Exploratory, not named beforehand: paired differences of AUROC on {table['labels'][0]}, test patients and "
                "draws resampled together 10,000 times; p by Holm over this table."
            ]
            heads = ["contrast", "patients", "difference", "p", "p (Holm)", "draws"]
            found.append((f"{title}, exploratory contrasts", heads, rows, said))
        rows = [
            [row["mode"], row["patients"], row["label"], row["group"], figure(row["auroc"]), str(row["draws"]),
             "yes" if row["at_chance"] else "no"]
            for row in table["permuted"]
        ]  # fmt: skip
        if rows:
            said = ["Labels dealt out anew among the labelled patients: what comes out must be chance."]
            heads = ["mode", "patients", "label", "within", "AUROC", "draws", "interval holds 0.5"]
            found.append((f"{title}, permuted labels", heads, rows, said))
    return found


def p(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def notes(result: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What must be read with a table."""
    counts, cells = table["counts"], table["cells"]
    labels = ", ".join(f"{name} {n['positive']}/{n['negative']}" for name, n in counts["labels"].items())
    how = f"{counts['folds']} patient folds, pooled by rank within each;" if counts["folds"] else "Test patients apart;"
    found = [
        ("Synthetic images. " if result["synthetic"] else "")
        + f"{how} {counts['test_images']} test images of {counts['test_patients']} patients (positive/negative: {labels}); "
        f"all: {counts['train_patients']} labelled patients"
        + (" or a little more" if counts["folds"] else "")
        + f". 95 % intervals: test patients and draws resampled {result['resamples']} times."
    ]
    if len(table["labels"]) > 1:
        found.append(f"Labels: {', '.join(table['labels'])}; table.md and table.json hold each, overall and within.")
    if cells["done"] < cells["asked"]:
        found.append(f"Not finished: {cells['done']} of {cells['asked']} cells are done.")
    if table["primary"]:
        found.append(table["primary"]["sentence"])
    return found


def markdown(result: dict[str, Any]) -> str:
    return pages(result, grids(result))


def terminal(result: dict[str, Any]) -> Any:
    return tables(result, grids(result, short=True))


# -- the figure ---------------------------------------------------------------------------------------------------------


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Curves of AUROC over labelled patients: a line of panels for the first label (and the mean of labels) of each set,
    a panel a mode, an arm a color, with 95 % intervals."""
    lines = [
        (table, label)
        for table in result["tables"] if table["rows"]
        for label in dict.fromkeys([table["labels"][0], *(row["label"] for row in table["rows"][-1:])])
    ]  # fmt: skip
    if not lines:
        return
    modes = list(dict.fromkeys(row["mode"] for table, _ in lines for row in table["rows"]))
    arms = list(dict.fromkeys(row["arm"] for table, _ in lines for row in table["rows"]))
    plain = {row["arm"] for table, _ in lines for row in table["rows"] if row["permuted"]}
    palette = [color for place, color in enumerate(colormaps["tab10"].colors) if place != 7]  # its gray is for chance
    colors = {arm: palette[place % 9] for place, arm in enumerate(arm for arm in arms if arm not in plain)}
    colors |= {arm: (0.45, 0.45, 0.45) for arm in plain}
    sheet = Figure(figsize=(1.2 + 4.6 * len(modes), 0.9 + 3.3 * len(lines)), layout="constrained")
    panels = sheet.subplots(len(lines), len(modes), squeeze=False, sharey="row")
    for (table, label), row_of_panels in zip(lines, panels):
        for mode, panel in zip(modes, row_of_panels):
            rows = [r for r in table["rows"] if (r["label"], r["group"], r["mode"]) == (label, OVERALL, mode)]
            _panel(panel, rows, arms, colors, plain)
            synthetic = "synthetic, " if result["synthetic"] else ""
            panel.set_title(f"{table['set']}: {label}\n{synthetic}{mode}", fontsize=10)
        row_of_panels[0].set_ylabel("AUROC (logit axis)")
    handles = {h.get_label(): h for panel in panels.flat for h in panel.get_legend_handles_labels()[0]}
    ordered = [arm for arm in arms if arm in handles]
    sheet.legend(
        [handles[arm] for arm in ordered],
        ordered,
        loc="outside lower center",
        ncols=2 * len(modes),
        fontsize=9,
        frameon=False,
    )
    with atomic_path(path) as temporary:
        sheet.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _panel(panel: Any, rows: list[dict[str, Any]], arms: list[str], colors: dict[str, Any], plain: set[str]) -> None:
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(row["patients"], row["labelled_patients"])
    there = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    spread = max(places.values(), default=1) / min(places.values(), default=1)
    panel.axhline(0.5, color="0.8", linewidth=1, zorder=0)
    for place, arm in enumerate(there):
        mine = [row for row in rows if row["arm"] == arm and row["auroc"]["low"] is not None]
        mine.sort(key=lambda row: places[row["patients"]])
        if not mine:
            continue
        aside = spread ** (0.012 * (place - (len(there) - 1) / 2))  # so that intervals stand beside each other
        x = [places[row["patients"]] * aside for row in mine]
        y, low, high = ([_shown(row["auroc"][end]) for row in mine] for end in ("value", "low", "high"))
        line = {"linestyle": ":" if arm in plain else "-", "marker": "o", "markersize": 3.5, "linewidth": 1.3}
        panel.vlines(x, low, high, color=colors[arm], linewidth=0.9)
        panel.plot(x, y, color=colors[arm], label=arm, **line)
    panel.set_xscale("log")
    panel.set_xticks(
        list(places.values()), [name if name.isdigit() else f"{name}\n({count})" for name, count in places.items()]
    )
    panel.set_yscale("logit")  # or what is near 1 could not be told apart
    low, high = panel.get_ylim()
    panel.set_yticks(found := [tick for tick in TICKS if low <= tick <= high], [f"{tick:g}" for tick in found])
    panel.minorticks_off()
    panel.set_xlabel("labelled patients")
    panel.spines[["top", "right"]].set_visible(False)


def _shown(value: float) -> float:
    return min(max(value, TICKS[0]), TICKS[-1])
