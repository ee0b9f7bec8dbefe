"""Pictures of an archive, found below its folder in whichever layout it was unpacked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from carina.errors import CarinaError


def by_name(*endings: str, skip: Sequence[str] = ()) -> Callable[[Path, list[str]], list[str]]:
    """Finds pictures by their file name anywhere below the folder, as archives in numbered parts need.

    endings: tried in turn in place of the name's own. skip: folders with other pictures of the same names.
    """

    def locate(folder: Path, names: list[str]) -> list[str]:
        stems: dict[str, str] = {}
        for root, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if name not in skip)
            below = os.path.relpath(root, folder).replace(os.sep, "/")
            prefix = "" if below == "." else below + "/"
            for file in sorted(files):
                stems.setdefault(file, prefix + file)
        places, found = [], False
        for name in names:
            base = name.rsplit("/", 1)[-1]
            stem = base.rsplit(".", 1)[0] if "." in base else base
            tries = [base, *(stem + ending for ending in endings)]
            place = next((stems[file] for file in tries if file in stems), None)
            found = found or place is not None
            places.append(place or base)
        if names and not found:
            raise nothing_found(folder, names[0])
        return places

    return locate


def by_path(*prefixes: str, endings: Sequence[str] = ("",), cut: str = "") -> Callable[[Path, list[str]], list[str]]:
    """Finds pictures by the path that the table gives, below one of `prefixes` (globs), the same for all.

    endings: replace the path's own ("" keeps it). cut: a first folder of the table's path that may be missing.
    """

    def locate(folder: Path, names: list[str]) -> list[str]:
        roots = []
        for prefix in prefixes or ("",):
            below = sorted(folder.glob(prefix)) if prefix else [folder]
            roots += [os.path.relpath(root, folder).replace(os.sep, "/") for root in below if root.is_dir()]
        forms = [(root, ending, drop) for root in roots for ending in endings for drop in dict.fromkeys(("", cut))]

        def place(name: str, form: tuple[str, str, str]) -> str:
            root, ending, drop = form
            name = name.removeprefix(drop)
            if ending:
                name = name.rsplit(".", 1)[0] + ending
            return name if root == "." else f"{root}/{name}"

        for name in names:
            for form in forms:
                if (folder / place(name, form)).is_file():
                    return [place(name, form) for name in names]
        if names:
            raise nothing_found(folder, names[0])
        return []

    return locate


def nothing_found(folder: Path, name: str) -> CarinaError:
    return CarinaError(
        f"{folder} holds none of the pictures that its table names (the first is {name}); give the folder in which "
        "the archive was unpacked"
    )
