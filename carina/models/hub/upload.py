"""The upload: private unless wished otherwise, in one commit, gone on with after a failure, and checked in the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from carina import __version__
from carina.errors import CarinaError
from carina.models.hub.folder import read_sums

TRIES = 4
WAIT = 2.0  # seconds before the second try, doubled each time
OURS = ["*.safetensors", "*.onnx", "member-*", "carina.json", "predictor.json", "config.json", "recipe.yaml"]


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload the folder through huggingface_hub with the user's token; returns the address.

    Large files go first, each once: what the hub holds already is not sent again, so after an interruption the same
    command goes on. Then one commit makes everything visible at once, and removes what an earlier version had besides.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # exist_ok keeps a public repository public
            raise CarinaError(f"{repo} exists and is public; make it private on the hub, or give private=false")
        _patiently(api, repo, folder)
        _check_arrived(api, repo, folder)
    except CarinaError:
        raise
    except LocalTokenNotFoundError:
        raise CarinaError("no token for the hub is set; log in with `hf auth login`, or use --dry-run") from None
    except Exception as error:  # the hub client and its transport raise many kinds; none is carina's
        raise CarinaError(
            f"the hub could not be reached or refused {repo} ({type(error).__name__}); the folder {folder} is ready: "
            "check the name and token, and give the command again"
        ) from None
    return str(url)


def _patiently(api: Any, repo: str, folder: Path) -> None:
    for attempt in range(TRIES):
        try:
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"carina {__version__}", delete_patterns=OURS
            )
            return
        except Exception as error:
            if attempt == TRIES - 1 or not _passing(error):
                raise
            time.sleep(WAIT * 2**attempt)


def _passing(error: Exception) -> bool:
    """Whether another try may go well: the line broke, or the hub is busy."""
    import httpx

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def _check_arrived(api: Any, repo: str, folder: Path) -> None:
    """Every file is there with its size and, where the hub tells, its checksum."""
    sums = read_sums(folder)
    there = {item.path: item for item in api.list_repo_tree(repo, recursive=True) if hasattr(item, "size")}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        item = there.get(name)
        stored = getattr(getattr(item, "lfs", None), "sha256", None)
        if item is None or item.size != path.stat().st_size or (stored and stored != sums[name]):
            raise CarinaError(f"{name} did not arrive whole at {repo}; give the command again")
