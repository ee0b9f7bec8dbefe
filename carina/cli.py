"""The command line: one grammar for every verb, and every ending in one place.

Exit codes: 0 done, 1 a fault of carina, 2 a fault in what was asked or given, 130 interrupted, 128 + signal when a
signal asked a run to stop (143 for SIGTERM) and a checkpoint was written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from carina import __version__
from carina.errors import CarinaError, Preempted, nearest

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Verb:
    """works_on: what stands before the overrides. flags: of this verb alone. run: (arguments, positionals, overrides)."""

    works_on: str
    about: str
    example: str
    run: Callable[[argparse.Namespace, list[str], list[str]], Any]
    positionals: tuple[int, int | None] = (1, 1)
    flags: tuple[tuple[str, str], ...] = ()


def _prepare(args, positionals, overrides):
    from carina.intake.prepare import prepare

    if args.print:
        from carina.intake.recipe import PrepareRecipe

        if os.path.isfile(os.path.join(positionals[0], "store.json")):
            return _print_given(positionals, overrides)
        return _print_recipe("prepare", PrepareRecipe, "default", overrides)
    result = prepare(positionals[0], overrides, dry_run=args.dry_run, quiet=args.quiet)
    if "labels_hash" in result and "plan" not in result and not args.json:  # the labels of a store were changed
        _say_pairs(result)
    return result


def _pretrain(args, positionals, overrides):
    from carina.pretrain.run import listing, pretrain

    if args.list:
        rows = listing()
        if not args.json:
            print("\n".join(f"{row['name']:<28} {row['about']}" for row in rows))
        return {"recipes": rows}
    if not positionals:
        raise CarinaError("pretrain needs a recipe; carina pretrain --list shows those that ship")
    if args.print:
        from carina.pretrain.recipe import PretrainRecipe

        return _print_recipe("pretrain", PretrainRecipe, positionals[0], overrides)
    result = pretrain(positionals[0], overrides, resume=args.resume, dry_run=args.dry_run, quiet=args.quiet)
    if args.dry_run and not args.json:
        _say_pairs(result)
    return result


def _finetune(args, positionals, overrides):
    if positionals[0] == "protocol":
        return _protocol(args, positionals[1:], overrides)
    if len(positionals) > 1:
        raise CarinaError(f"carina finetune does not know what to do with '{positionals[1]}'; it takes one recipe")
    from carina.finetune.run import finetune, recipe_model

    if args.print:
        return _print_recipe("finetune", recipe_model(positionals[0]), positionals[0], overrides)
    result = finetune(positionals[0], overrides, resume=args.resume, dry_run=args.dry_run, quiet=args.quiet)
    if args.dry_run and not args.json:
        _say_pairs(result)
    return result


def _protocol(args, positionals, overrides):
    if not positionals:
        from carina.recipes import shipped

        names = ", ".join(shipped("protocol"))
        raise CarinaError(f"carina finetune protocol needs its name: one of {names}, or a YAML file")
    from carina.finetune.protocol import protocol, read_protocol, terminal

    if args.print:
        return _print_resolved(read_protocol(positionals[0], overrides))
    result = protocol(positionals[0], overrides, dry_run=args.dry_run, quiet=args.quiet)
    if not args.json:
        _say_pairs(result) if args.dry_run else _show(terminal(result), width=170)
    return result


def _evaluate(args, positionals, overrides):
    from carina.evaluate.score import EvaluateRecipe, evaluate

    if args.print:
        return _print_recipe("evaluate", EvaluateRecipe, "default", overrides)
    result = evaluate(positionals[0], overrides, quiet=args.quiet)
    if not args.json:
        from carina.evaluate.terminal import terminal_table

        _show(terminal_table(result))
    return result


def _compare(args, positionals, overrides):
    from carina.evaluate.compare import CompareSettings, table
    from carina.evaluate.compare import main as compare
    from carina.recipes import parse_overrides, validate

    settings = validate(CompareSettings, parse_overrides(overrides), "compare")
    result = compare(settings.a, settings.b, settings.resamples, method=settings.method)
    if settings.out:
        from carina.files import write_json

        write_json(f"{settings.out}/comparison.json", result)
    if not args.json:
        _show(table(result))
        for row in (*result["rows"], *result["mcnemar"]):
            print(row["sentence"])
    return result


def _predict(args, positionals, overrides):
    from carina.evaluate.predict import predict, terminal_table

    if overrides:
        raise CarinaError(f"predict takes no overrides, '{overrides[0]}' was given")
    others = args.beside.split(",") if args.beside else []
    how = {"maps": args.maps, "method": args.method, "others": others, "csv": args.csv, "quiet": args.quiet}
    result = predict(positionals[0], positionals[1:], **how)
    if not args.json:
        _show(terminal_table(result))
    return result


def _embed(args, positionals, overrides):
    from carina.evaluate.predict import embed

    return embed(positionals[0], positionals[1:], overrides, quiet=args.quiet)


def _publish(args, positionals, overrides):
    from carina.publish import publish

    return publish(positionals[0], overrides, dry_run=args.dry_run, quiet=args.quiet)


def _inspect(args, positionals, overrides):
    if overrides:
        result = _looked_at(positionals[0], overrides)
        if not args.json and (rows := result.get("neighbors") or result.get("fields")):
            _show(_listed(rows))
    else:
        from carina.inspect import inspect

        result = inspect(positionals[0])
    if not args.json:
        _say_pairs(result)
    return result


def _listed(rows):
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(row[name]) if row.get(name) is not None else "" for name in names))
    return table


def _looked_at(path, overrides):
    if path.endswith(".parquet"):
        from carina.evaluate.neighbors import look
    else:
        from carina.evaluate.receptive import look
    return look(path, overrides)


def _doctor(args, positionals, overrides):
    from carina.doctor import doctor, show

    result = doctor()
    if not args.json:
        _show(show(result))
    return result


def _quickstart(args, positionals, overrides):
    from carina.quickstart import quickstart

    return quickstart(overrides, quiet=args.quiet, as_json=args.json)


RESUME = ("--resume", "go on with an interrupted run of the same recipe")
DRY = ("--dry-run", "say what it would take or write, and do no more")

VERBS: dict[str, Verb] = {
    "prepare": Verb(
        "SOURCE",
        "files -> store. SOURCE: a folder, a glob, a CSV with a column `path`, CATALOG:FOLDER (nih14:/data/nih), "
        "hf:DATASET, or a store (with labels=new.csv: add or correct labels).",
        "carina prepare labels.csv out=store scales=[128,256] patient=patient_id labels=[Pneumonia,Effusion]",
        _prepare,
        (1, 1),
        (DRY,),
    ),
    "pretrain": Verb(
        "RECIPE",
        "store -> backbone. RECIPE: a shipped name or a YAML file.",
        "carina pretrain moco_anatpaste_resnet18 store=store out=runs/pretrained scales=[128] epochs=50",
        _pretrain,
        (0, 1),
        (RESUME, DRY, ("--list", "the recipes that ship")),
    ),
    "finetune": Verb(
        "RECIPE",
        "backbone + store -> predictor. RECIPE: classify, anomaly or a YAML file; or protocol NAME: every arm of a protocol "
        "in one table, gone on with by the same command.",
        "carina finetune classify backbone=runs/pretrained store=store out=runs/frozen mode=frozen labels=[Pneumonia]",
        _finetune,
        (1, 2),
        (RESUME, DRY),
    ),
    "evaluate": Verb(
        "RUN",
        "predictor + store -> predictions and report.",
        "carina evaluate runs/frozen store=store split=test out=runs/frozen/evaluations/test",
        _evaluate,
    ),
    "compare": Verb(
        "",
        "paired differences between two arms.",
        "carina compare a=runs/a/evaluations/test b=runs/b/evaluations/test",
        _compare,
        (0, 0),
    ),
    "predict": Verb(
        "RUN FILES...",
        "scores of files that were never in a store.",
        "carina predict runs/frozen images/*.png --maps maps --json",
        _predict,
        (2, None),
        (
            ("--maps=DIR", "write a heat map beside every score"),
            ("--method=NAME", "of the heat maps: gradcam (default), rollout or integrated_gradients"),
            ("--beside=RUN,RUN", "other runs whose heat maps are held against those of RUN: how far they agree"),
            ("--csv=FILE", "write the scores, a row a file"),
        ),
    ),
    "embed": Verb(
        "RUN STORE|FILES...",
        "features of a store's rows, or of files.",
        "carina embed runs/pretrained store out=features.parquet",
        _embed,
        (2, None),
    ),
    "publish": Verb(
        "RUN",
        "backbone or predictor -> hub, after a search for identifiers and a test that it loads; --dry-run sends nothing.",
        "carina publish runs/pretrained repo=org/name license=apache-2.0 out=published --dry-run",
        _publish,
        (1, 1),
        (DRY,),
    ),
    "inspect": Verb(
        "PATH",
        "what an artefact is and holds; with nearest=IMAGE_ID or map=FILE.png: neighbors or a map among features; with "
        "field=FILE.png: what the layers of a backbone see.",
        "carina inspect features.parquet map=map.png color=view store=store",
        _inspect,
    ),
    "doctor": Verb("", "what this machine can do, and what is missing.", "carina doctor", _doctor, (0, 0)),
    "quickstart": Verb(
        "", "everything once, on synthetic radiographs.", "carina quickstart out=carina-quickstart", _quickstart, (0, 0)
    ),
}


def _print_recipe(stage: str, model, name: str, overrides: list[str]) -> dict[str, Any]:
    from carina.recipes import build

    return _print_resolved(build(stage, model, name, overrides))


def _print_resolved(recipe) -> dict[str, Any]:
    from carina.recipes import to_yaml

    print(to_yaml(recipe), end="", file=sys.stderr if "--json" in sys.argv else sys.stdout)
    return recipe.model_dump(mode="json")


def _print_given(positionals: list[str], overrides: list[str]) -> dict[str, Any]:
    from carina.recipes import parse_overrides

    given = {"works_on": positionals, **parse_overrides(overrides)}
    for key, value in given.items():
        print(f"{key}: {value}", file=sys.stderr if "--json" in sys.argv else sys.stdout)
    return given


def _show(renderable: Any, width: int = 120) -> None:
    """width: in characters, where no terminal says it."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(renderable)


def _say_pairs(values: dict[str, Any], indent: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _say_pairs(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{indent}{key}: {len(value)}")
        else:
            print(f"{indent}{key}: {value}")


def _parser(verb: str) -> argparse.ArgumentParser:
    entry = VERBS[verb]
    usage = f"carina {verb} {entry.works_on} [key=value ...] [flags]".replace("  ", " ")
    parser = argparse.ArgumentParser(
        prog=f"carina {verb}",
        usage=usage,
        description=entry.about,
        epilog=f"example: {entry.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for flag, text in entry.flags:
        name, _, metavar = flag.partition("=")
        if metavar:
            parser.add_argument(name, metavar=metavar, help=text)
        else:
            parser.add_argument(name, action="store_true", help=text)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, all else on standard error"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")
    parser.add_argument("--print", action="store_true", help="the resolved recipe, nothing run")
    return parser


def _overview() -> str:
    lines = ["carina: from unlabelled chest X-rays to a published, honestly evaluated backbone", ""]
    lines += [f"  carina {name:<11}{verb.about}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "carina VERB --help shows an example of each.", f"version {__version__}"])


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in VERBS:
        raise CarinaError(f"'{name}' is not a verb of carina{nearest(name, VERBS)}; carina --help lists them")
    verb, parser = VERBS[name], _parser(name)
    try:
        args, extra = parser.parse_known_intermixed_args(arguments[1:])
    except argparse.ArgumentError as error:
        raise CarinaError(f"carina {name}: {error}") from None
    if extra:
        flags = [flag.partition("=")[0] for flag, _ in verb.flags] + ["--json", "--quiet", "--print", "--help"]
        raise CarinaError(f"carina {name} has no flag {extra[0]}{nearest(extra[0], flags)}")
    overrides = [word for word in args.words if OVERRIDE.match(word)]
    positionals = [word for word in args.words if not OVERRIDE.match(word)]
    least, most = verb.positionals
    if len(positionals) < least:
        raise CarinaError(f"carina {name} needs {verb.works_on}; for example: {verb.example}")
    if most is not None and len(positionals) > most:
        raise CarinaError(f"carina {name} does not know what to do with '{positionals[most]}'; example: {verb.example}")
    if args.print and name not in ("prepare", "pretrain", "finetune", "evaluate"):
        result = _print_given(positionals, overrides)  # these have no recipe beyond what was given
    else:
        result = verb.run(args, positionals, overrides)
    if args.json and int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result, allow_nan=False))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except CarinaError as error:
        print(f"carina: {error}", file=sys.stderr)
        return 2
    except Preempted as error:
        print(f"carina: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("carina: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception:
        traceback.print_exc()
        print("carina: this is a fault of carina; please report it with the lines above", file=sys.stderr)
        return 1
