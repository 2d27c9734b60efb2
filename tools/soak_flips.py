"""Single flipped bits in a cache: `cache-teacher verify` must find each, and name its file.

python tools/soak_flips.py --cases 2000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from soak import Target

from teacher_cache.format.checking.verify import verify_cache


@dataclass
class Flips:
    """Outcome of the flips."""

    by_file: collections.Counter[str] = field(default_factory=collections.Counter)
    missed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # found, but under another file's name


def flip_bits(folder: Path, num_flips: int, seed: int) -> Flips:
    """Flip one bit at a time in the committed files, small files as often as large ones."""
    files = [folder / "cache.json", *sorted((folder / "shards").iterdir())]
    rng = np.random.default_rng(seed)
    flips = Flips()
    for _ in range(num_flips):
        file = files[int(rng.integers(len(files)))]
        original = file.read_bytes()
        place, bit = int(rng.integers(len(original))), int(rng.integers(8))
        damaged = bytearray(original)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        errors = verify_cache(str(folder)).errors
        file.write_bytes(original)
        name = str(file.relative_to(folder))
        flips.by_file[name] += 1
        if not errors:
            flips.missed.append(f"{name}: bit {bit} of byte {place}")
        elif {error.file for error in errors} != {name}:
            flips.elsewhere.append(f"{name}: bit {bit} of byte {place}: {errors}")
    return flips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="A copy of this one; a small one otherwise.")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        if arguments.cache is None:
            Target(folder)
        else:
            shutil.copytree(arguments.cache, folder)
        flips = flip_bits(folder, arguments.cases, arguments.seed)
    for name, count in sorted(flips.by_file.items()):
        print(f"{name:32} {count:>7,} flips")
    for finding in [*flips.missed, *flips.elsewhere][:20]:
        print(finding)
    print(
        f"{arguments.cases:,} flips in {time.monotonic() - start:.0f} s: "
        f"{len(flips.missed)} missed, {len(flips.elsewhere)} found under another file's name"
    )
    sys.exit(bool(flips.missed or flips.elsewhere))


if __name__ == "__main__":
    main()
