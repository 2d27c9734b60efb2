"""Workers that share one input without communicating: which takes a trace, which have finished.

DIR/parts/w3of8.json        worker 3 of 8: the input it took on, and whether its part is done
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from teacher_cache.format.checksums import DamagedFileError, parse_record, record_bytes
from teacher_cache.format.errors import CacheFormatError, CacheMismatchError
from teacher_cache.format.store import Store

PARTS_FOLDER = "parts"
_NAME = re.compile(r"w(\d+)of(\d+)\Z")
_REMEDY = "Remove it, and run that worker's command again."


@dataclass(frozen=True, order=True)
class InputShare:
    """Worker `index` (from 0) of `count` that share one input."""

    count: int
    index: int

    @property
    def name(self) -> str:
        """Name of this worker."""
        return f"w{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, source_id: str) -> bool:
        """Whether a row is this worker's; this depends on its id alone, not on other rows."""
        digest = hashlib.sha256(source_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


def parse_worker(text: str) -> tuple[str, InputShare | None]:
    """Parse a worker: its name, and its part if it is one of several (`3/8`, or a plain name).

    Raises:
        ValueError: If it is neither.
    """
    if _NAME.match(text):
        raise ValueError(
            f"worker: {text!r} is the name of a part; write {text[1:].replace('of', '/')} instead"
        )
    if "/" not in text:
        return text, None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(
            f"worker: expected i/n with i from 0 to n - 1, got {text!r} (for n tasks of Slurm: "
            "--array=0-(n-1))"
        )
    part = InputShare(count=int(found[2]), index=int(found[1]))
    return part.name, part


@dataclass(frozen=True)
class ShareRecord:
    """Facts that one worker of several knows at its start, and whether it has finished."""

    input_hash: str  # covers every trace that all workers together must capture
    num_input: int  # number of these
    num_traces: int  # of these, this worker's
    finished: bool


def publish_share(store: Store, part: InputShare, record: ShareRecord) -> None:
    """Record a worker's state, replacing its earlier record.

    Raises:
        OSError: If it cannot be written.
    """
    store.make_folder(PARTS_FOLDER)
    store.publish(f"{PARTS_FOLDER}/{part.name}.json", record_bytes(asdict(record)))


def read_shares(store: Store) -> dict[InputShare, ShareRecord]:
    """The latest record of every worker.

    Raises:
        CacheFormatError: If a record is damaged.
    """
    records = {}
    for file in store.sizes(PARTS_FOLDER):
        found = _NAME.match(file.removesuffix(".json"))
        if found is not None:
            part = InputShare(count=int(found[2]), index=int(found[1]))
            where = f"{store.where}/{PARTS_FOLDER}/{file}"
            try:
                values = parse_record(store.read(f"{PARTS_FOLDER}/{file}"), where, _REMEDY)
                records[part] = ShareRecord(**values)
            except DamagedFileError as error:
                raise CacheFormatError(str(error)) from error
            except TypeError as error:  # intact, but of other fields
                raise CacheFormatError(f"{where}: not the record of a worker: {error}") from error
    return records


def require_all_parts(store: Store) -> None:
    """Check that all workers that share an input have finished it.

    The largest input counts, because a trial run with a limit may precede it. Nothing is known
    about workers with plain names.

    Raises:
        CacheMismatchError: Names those that have not.
    """
    records = read_shares(store)
    if not records:
        return
    num_input = max(record.num_input for record in records.values())
    crews = {
        (part.count, record.input_hash)
        for part, record in records.items()
        if record.num_input == num_input
    }
    lacking = [shares_to_come(records, count, input_hash) for count, input_hash in sorted(crews)]
    if all(lacking):
        fewest = min(lacking, key=len)
        named = ", ".join(f"{part} {why}" for part, why in fewest.items())
        raise CacheMismatchError(
            f"{store.where}: not all of the {num_input:,} traces are there yet: worker {named}. "
            "Run these commands (again), or seal without their traces with --allow-missing."
        )


def shares_to_come(
    records: Mapping[InputShare, ShareRecord], count: int, input_hash: str
) -> dict[InputShare, str]:
    """Those of `count` workers that have not finished an input, each with the reason."""
    reasons = {}
    for index in range(count):
        record = records.get(part := InputShare(count, index))
        if record is None:
            reasons[part] = "has not started"
        elif record.input_hash != input_hash:
            reasons[part] = f"took on another input, of {record.num_input:,} traces"
        elif not record.finished:
            reasons[part] = "has not finished"
    return reasons
