"""`cache-teacher push`: a sealed cache as a dataset on the Hugging Face Hub.

Files go in commits of a bounded size, `cache.json` last: a repository that was left half-way is not
a cache, and running the command again sends what is missing. What the Hub holds at the end is
compared, file by file, with what is here. A repository that holds anything else is left alone, and
so is a card that was edited there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.format import CacheError, CacheMismatchError, open_store
from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER
from teacher_cache.format.records import require_manifest
from teacher_cache.format.writing.card import CARD_NAME, card_text
from teacher_cache.terminal.option import check_options, option
from teacher_cache.transform.hub_dataset import HubDataset, Outgoing

_TARGET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)/?\Z")
_FILES_AT_ONCE, _BYTES_AT_ONCE = 64, 1 << 30  # of one commit
_GITATTRIBUTES = ".gitattributes"  # the Hub writes it into every repository


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """`cache-teacher push`."""

    cache: Path = option("Folder of the sealed cache.", is_argument=True)
    to: str = option("Repository, as hf://datasets/OWNER/NAME; made if missing.", is_argument=True)
    license: str | None = option(
        "License that the dataset card names, such as apache-2.0; the teacher's own may ask for "
        "one.",
        default=None,
        unset="what the card says",
    )
    private: bool = option("Make a new repository private.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        if _TARGET.match(self.to) is None:
            raise ValueError(f"TO: expected hf://datasets/OWNER/NAME, got {self.to!r}")

    @property
    def repository(self) -> str:
        """OWNER/NAME."""
        return self.to.removeprefix("hf://datasets/").rstrip("/")


@dataclass(frozen=True)
class PushReport:
    """Report of a push."""

    num_files: int  # of the cache
    num_sent: int  # by this run; the others were there already
    num_bytes_sent: int


def push(
    config: PushConfig, on_file: Callable[[int, int], None] = lambda done, total: None
) -> PushReport:
    """Check a cache, send what the repository lacks of it, and compare.

    Args:
        config: The cache and the repository.
        on_file: Called with the number of files that are there, and of all.

    Raises:
        CacheMismatchError: If the cache is not sealed, the repository holds something else, or it
            is public and was to be private.
        CacheError: If the cache is damaged, or the Hub refuses or does not answer.
        ValueError: If there is no card for the license.
    """
    store = open_store(config.cache)
    if require_manifest(store).seal is None:
        raise CacheMismatchError(f"{store.where}: not sealed; finish the capture, or seal it")
    if config.license is not None and not (config.cache / CARD_NAME).exists():
        raise ValueError(
            f"--license: {store.where} has no {CARD_NAME} to name it in; write one, or leave "
            "--license out"
        )
    errors = verify_cache(config.cache).errors
    if errors:
        raise CacheError(f"{store.where}: damaged, so not sent: {errors[0].file}: {errors[0].text}")
    hub = HubDataset(config.to, config.repository)
    held = _entries_there(config, hub)
    names = _names(config.cache)
    _require_ours(config, held, lambda name: name in names)
    files = [Outgoing.of(name, config.cache / name) for name in names]
    by_name = {file.name: file for file in files}
    _require_ours(config, held, lambda name: by_name[name].is_that(held[name]))
    card = _card(config, hub, there=CARD_NAME in held)
    if card is not None:
        files.insert(-1, Outgoing.of(CARD_NAME, card.encode()))
    return _sent(config, hub, files, held, on_file)


def _sent(
    config: PushConfig,
    hub: HubDataset,
    files: Sequence[Outgoing],
    held: dict[str, Any],
    on_file: Callable[[int, int], None],
) -> PushReport:
    """Send what is missing, and compare all files."""
    missing = [file for file in files if not file.is_that(held.get(file.name))]
    num_there = len(files) - len(missing)
    on_file(num_there, len(files))
    for batch in _batches(missing):
        hub.send(batch)
        num_there += len(batch)
        on_file(num_there, len(files))
    held = hub.entries()
    wrong = [file.name for file in files if not file.is_that(held.get(file.name))]
    if wrong:
        raise CacheMismatchError(
            f"{config.to}: holds another {wrong[0]} than was sent ({len(wrong)} files differ): "
            "someone else writes there; run the same command again"
        )
    return PushReport(len(files), len(missing), sum(file.size_bytes for file in missing))


def _entries_there(config: PushConfig, hub: HubDataset) -> dict[str, Any]:
    """What the repository holds; it is made if it is missing.

    Raises:
        CacheMismatchError: If it is public and was to be private.
    """
    is_private = hub.is_private()
    if is_private is None:
        hub.make(private=config.private)
    elif config.private and not is_private:
        raise CacheMismatchError(
            f"{config.to}: --private is for a new repository, and this one is there and public; "
            "make it private in its settings, or name another"
        )
    return hub.entries()


def _require_ours(config: PushConfig, held: Iterable[str], is_ours: Callable[[str], bool]) -> None:
    """Refuse a repository with files that are not this cache's.

    Raises:
        CacheMismatchError: If there is one.
    """
    others = sorted(n for n in held if n not in (_GITATTRIBUTES, CARD_NAME) and not is_ours(n))
    if others:
        raise CacheMismatchError(
            f"{config.to}: holds {others[0]}"
            + (f" and {len(others) - 1:,} more files" if len(others) > 1 else "")
            + f", not as in {config.cache}: expected an empty repository, or an earlier push of "
            "this very cache. Name another repository, or delete these files there"
        )


def _names(cache: Path) -> list[str]:
    """Files of a sealed cache but its card, `cache.json` last."""
    sealed = require_manifest(open_store(cache)).seal
    shards = [name for name, _ in sealed.shards] if sealed is not None else []
    names = [
        name
        for shard in shards
        for name in (
            f"{SHARD_FOLDER}/{shard}.arrow", f"{SHARD_FOLDER}/{shard}.json",
            f"messages/{shard}.arrow",
        )
        if (cache / name).exists()
    ]  # fmt: skip
    names += [name for name in (CATALOG_FILE,) if (cache / name).exists()]
    return [*names, MANIFEST_NAME]


def _card(config: PushConfig, hub: HubDataset, *, there: bool) -> str | None:
    """The card that the repository is to have; None where none is sent.

    A card that was edited on the Hub stays, but for the license that is asked for.
    """
    path = config.cache / CARD_NAME
    here = path.read_bytes().decode(errors="replace") if path.exists() else None
    if not there:
        card = here
    else:
        store = open_store(config.cache)
        manifest = require_manifest(store)
        made = None if manifest.seal is None else card_text(manifest.header, manifest.seal)
        card = hub.text(CARD_NAME)
        body, license_ = _parted(card)
        if here is not None and made is not None and body == _parted(made)[0]:
            card = here if license_ is None else _licensed(here, license_)
    if card is not None and config.license is not None:
        card = _licensed(card, f"license: {config.license}")
    return card


_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license:[^\n]*(?:\n(?:[ \t]+|- )[^\n]*)*\n", re.MULTILINE)


def _parted(card: str) -> tuple[str, str | None]:
    """The card without the license of its front matter, and that license's lines."""
    front = _FRONT_MATTER.match(card)
    found = None if front is None else _LICENSE.search(card, front.start(1), front.end(1))
    if found is None:
        return card, None
    return card[: found.start()] + card[found.end() :], found[0].rstrip("\r\n")


def _licensed(card: str, license_: str) -> str:
    """The card with these lines as the license in its front matter."""
    body, there = _parted(card)
    if there == license_:
        return card
    front = _FRONT_MATTER.match(body)
    if front is None:
        return f"---\n{license_}\n---\n\n{body}"
    return f"{body[: front.start(1)]}{license_}\n{body[front.start(1) :]}"


def _batches(files: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Files of one commit each; `cache.json` alone and last."""
    batch: list[Outgoing] = []
    for file in files:
        size_bytes = sum(each.size_bytes for each in batch) + file.size_bytes
        is_full = len(batch) == _FILES_AT_ONCE or size_bytes > _BYTES_AT_ONCE
        if batch and (is_full or file.name == MANIFEST_NAME):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch
