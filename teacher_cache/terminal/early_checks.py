"""Checks of a command's files and addresses before anything heavy is imported.

Every function raises ValueError that says what was expected, found, and similar.
"""

import contextlib
import difflib
import errno
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from teacher_cache.format import CachePath, shown
from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.manifest import JOURNAL_FOLDER, MANIFEST_NAME, SHARD_FOLDER
from teacher_cache.format.reachable import check_reachable
from teacher_cache.format.shares import PARTS_FOLDER
from teacher_cache.format.writing.card import CARD_NAME
from teacher_cache.terminal.escape import printable

_ANSWER_S = 5.0  # time for an address to answer
_LEAST_FREE_BYTES = 8 << 20
_OF_CACHE = {
    *(MANIFEST_NAME, CATALOG_FILE, CARD_NAME),
    *(SHARD_FOLDER, JOURNAL_FOLDER, PARTS_FOLDER, "noise", "removed"),
}


def check_file(path: Path, flag: str) -> None:
    """Refuse a file that is missing or cannot be read."""
    if path.is_file() and os.access(path, os.R_OK):
        return
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, found a folder: {printable(path)}")
    if path.is_file():
        raise ValueError(f"{flag}: {printable(path)} cannot be read (permission)")
    if path.exists():
        raise ValueError(f"{flag}: {printable(path)} is a device or a pipe, not a file")
    raise ValueError(f"{flag}: no such file: {printable(path)}{near_path(path)}")


def check_cache(path: CachePath, flag: str = "cache") -> None:
    """Refuse a local folder that is not a cache, or a URI that does not answer."""
    text = os.fspath(path)
    if "://" in text:
        check_reachable(text, shown(text))
        return
    if any((Path(text) / n).exists() for n in (MANIFEST_NAME, SHARD_FOLDER)):
        return
    folder = Path(text)
    found = "a file" if folder.is_file() else "a folder without cache.json"
    if not folder.exists():
        found = f"nothing{near_path(folder)}"
    raise ValueError(
        f"{flag}: {printable(text)}: no cache here: expected its folder, found {found}"
    )


def check_out_folder(path: CachePath, flag: str = "--out") -> None:
    """Refuse an output folder that cannot be created, is not writable, or has no room."""
    if "://" in os.fspath(path):
        return
    folder = Path(path)
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "a file" if nearest == folder else f"that {printable(nearest)} is a file"
        raise ValueError(f"{flag}: {printable(folder)}: expected a folder, found {what}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {printable(folder)}: {printable(nearest)} may not be written")
    free_bytes = shutil.disk_usage(nearest).free
    if free_bytes < _LEAST_FREE_BYTES:
        text = f"{flag}: {printable(folder)}: its disk has {free_bytes / 1e6:.1f} MB left"
        raise OSError(errno.ENOSPC, text)


def check_out_cache(path: CachePath, flag: str = "--out") -> None:
    """Refuse a cache folder that cannot be created, or that holds unrelated files."""
    check_out_folder(path, flag)
    if "://" in os.fspath(path) or not Path(path).is_dir():
        return
    folder = Path(path)
    strangers = sorted(each.name for each in folder.iterdir() if not _is_of_cache(each.name))
    if strangers and not (folder / MANIFEST_NAME).exists():
        raise ValueError(
            f"{flag}: {printable(folder)}: expected a new or empty folder, or a cache's, found "
            f"other files ({printable(strangers[0])}); name another one"
        )


def _is_of_cache(name: str) -> bool:
    """Whether a capture that has just begun may have left this file."""
    return name in _OF_CACHE or name.startswith((".tmp-", "rejects", "survey"))


def check_out_file(path: Path, flag: str, *, force: bool) -> None:
    """Refuse an output file that exists or whose folder is missing."""
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file to write, found a folder: {printable(path)}")
    if path.exists() and not force:
        raise ValueError(
            f"{flag}: {printable(path)} already exists; name another, or overwrite it with --force"
        )
    if not path.parent.is_dir():
        where = f"{printable(path.parent)}{near_path(path.parent)}"
        raise ValueError(f"{flag}: no such folder: {where}")


def check_model(name: str, flag: str) -> None:
    """Refuse a name that is neither a model folder nor on the hub; recognises misspelt folders."""
    folder = expanded(name)
    if folder.is_dir():
        inner = folder / "model"
        has_student = (inner / "config.json").is_file()
        if _is_run(folder):
            hint = f"its student is {printable(inner)}" if has_student else "it has no student yet"
            raise ValueError(f"{flag}: {printable(name)}: the folder is a run's; {hint}")
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            hint = f"; its student is {printable(inner)}" if has_student else ""
            raise ValueError(f"{flag}: {printable(name)}: the folder holds no config.json{hint}")
        return
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or folder.exists():
        raise ValueError(
            f"{flag}: {printable(name)}: no such folder, and not a valid name on the hub"
            f"{near_path(folder)}"
        )
    check_hub_name(name, flag, "models")


def _is_run(folder: Path) -> bool:
    """Whether a folder's config.json is that of `train-student run`, not of a model."""
    with contextlib.suppress(OSError):
        return b'"leadspan_run"' in (folder / "config.json").read_bytes()
    return False


def check_hub_name(name: str, flag: str, kind: str) -> None:
    """Refuse a name that is not a folder and not found on the hub.

    Args:
        name: As the user wrote it.
        flag: Name of the option.
        kind: `models` or `datasets`.
    """
    if _hub_copy(name, kind).is_dir():
        return
    is_known, near = _is_on_hub(name, kind), near_path(expanded(name))
    if is_known is None:
        raise ValueError(
            f"{flag}: {printable(name)}: no such folder{near}, no copy from the Hugging Face hub, "
            "and the hub does not answer"
        )
    if not is_known and near:
        raise ValueError(f"{flag}: {printable(name)}: no such folder{near}, nor on the hub")


def expanded(name: str) -> Path:
    """A path whose ~ is the user's home; unchanged if the user has none."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def near_path(path: Path) -> str:
    """` (did you mean ...?)` if a neighbour has a similar name, else nothing."""
    with contextlib.suppress(OSError):
        return _near(path.name, path.parent)
    return ""


def _near(name: str, folder: Path) -> str:
    names: Iterable[str] = (each.name for each in folder.iterdir())
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {printable(folder / found[0])}?)" if found else ""


def _hub_copy(name: str, kind: str) -> Path:
    """Folder where the hub's client caches a repository."""
    home = expanded(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return cache / f"{kind}--{name.replace('/', '--')}"


def _is_on_hub(name: str, kind: str) -> bool | None:
    """Whether the hub knows a name; None if it does not answer."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/api/{kind}/{name}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError:  # unknown, or visible to some users only
        return False
    except (OSError, ValueError):
        return None


def check_ray_address(address: str | None) -> None:
    """Refuse a Ray cluster whose address does not answer."""
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise ValueError(
            f"--ray-address: expected auto, HOST:PORT or ray://HOST:PORT, got {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except OSError as error:
        raise ValueError(f"--ray-address: nobody answers at {address}: {error}") from error


def check_wandb_login() -> None:
    """Refuse Weights & Biases without an API key before the slow imports."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = base.partition("://")[2].partition("/")[0].partition(":")[0]
    netrc = expanded(os.environ.get("NETRC", "~/.netrc"))
    with contextlib.suppress(OSError):
        if host in netrc.read_text(encoding="utf-8", errors="replace"):
            return
    raise ValueError(
        "--tracker wandb: no API key found; run `wandb login`, set WANDB_API_KEY, or set "
        "WANDB_MODE=offline"
    )
