"""Workers that share one input without talking: whose a trace is, and who has finished.

DIR/parts/w3of8.json        worker 3 of 8: the input that it took on, and whether its part is done
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from teacher_cache.format.errors import CacheFormatError, CacheMismatchError
from teacher_cache.format.header import UNUSABLE_JSON
from teacher_cache.format.store import Store

PARTS_FOLDER = "parts"
_NAME = re.compile(r"w(\d+)of(\d+)\Z")


@dataclass(frozen=True, order=True)
class InputShare:
    """Worker `index` (from 0) of `count` that share one input."""

    count: int
    index: int

    @property
    def name(self) -> str:
        """Its name as a worker."""
        return f"w{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, source_id: str) -> bool:
        """Whether a row of the input is this worker's: of its id alone, whatever rows there are."""
        digest = hashlib.sha256(source_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


def parse_worker(text: str) -> tuple[str, InputShare | None]:
    """A worker's name, and its part where it is one of several: `3/8`, or a plain name.

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
    """What one worker of several knows when it begins, and whether it has ended."""

    input_hash: str  # of every trace that all the workers together must bring
    num_input: int  # how many these are
    num_traces: int  # of these, this worker's
    finished: bool


def publish_share(store: Store, part: InputShare, record: ShareRecord) -> None:
    """Say how far a worker is; what it said before is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    store.make_folder(PARTS_FOLDER)
    store.publish(f"{PARTS_FOLDER}/{part.name}.json", json.dumps(asdict(record)).encode())


def read_shares(store: Store) -> dict[InputShare, ShareRecord]:
    """What every worker of several said last.

    Raises:
        CacheFormatError: If a record is damaged.
    """
    records = {}
    for file in store.sizes(PARTS_FOLDER):
        found = _NAME.match(file.removesuffix(".json"))
        if found is not None:
            part = InputShare(count=int(found[2]), index=int(found[1]))
            try:
                records[part] = ShareRecord(**json.loads(store.read(f"{PARTS_FOLDER}/{file}")))
            except UNUSABLE_JSON as error:
                raise CacheFormatError(
                    f"{store.where}/{PARTS_FOLDER}/{file}: not the record of a worker: {error!r}"
                ) from error
    return records


def require_all_parts(store: Store) -> None:
    """Make sure that workers who share an input have all finished it.

    The largest input counts: a trial run with a limit may have gone before it. Nothing is known
    of workers with names of their own.

    Raises:
        CacheMismatchError: Naming those that have not.
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
    """Which of `count` workers have not finished an input, and how that is known."""
    reasons = {}
    for index in range(count):
        record = records.get(part := InputShare(count, index))
        if record is None:
            reasons[part] = "has never begun"
        elif record.input_hash != input_hash:
            reasons[part] = f"took on another input, of {record.num_input:,} traces"
        elif not record.finished:
            reasons[part] = "has not finished"
    return reasons
