"""Learning rates for the arms of rounds, on a seed of their own.

    python tools/rounds/tune.py OUT

A small grid around `arms.ARMS`, on seed 100 alone, which none of the compared runs has. `ARMS`
holds what it chose: of every arm the variant with the most right answers (of reverse the two best).
"""

import sys
from dataclasses import replace
from pathlib import Path

from arms import ARMS, run_all

SEED = 100
RATES = {
    "one-scalar": (5e-4, 1.5e-4, 5e-5),
    "reverse": (2.5e-4, 1e-4, 5e-5),
    "off-policy": (5e-4, 2.5e-4, 1e-4),
}


def main(out: Path) -> None:
    """Run the grid, and print its table."""
    by_name = {arm.name: arm for arm in ARMS}
    grid = [
        replace(by_name[name], name=f"{name}-lr{rate:g}", lr=rate)
        for name, rates in RATES.items()
        for rate in rates
    ]
    lines = run_all(out, [SEED], grid)
    print("| variant | right answers | held-out KL | own KL | staleness |")
    print("| --- | --- | --- | --- | --- |")
    for line in lines:
        own = " ".join(f"{kl:.3f}" for kl in line.get("own_kl", []) if kl is not None)
        stale = "" if line.get("staleness") is None else f"{line['staleness']:.4f}"
        print(
            f"| {line['arm']} | {line['accuracy']:.1%} | {line['heldout_kl']:.4f} | {own} | "
            f"{stale} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
