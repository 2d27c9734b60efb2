"""Choice of adapters: a value that a configuration can hold without loading torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """Adapters that are trained beside frozen weights."""

    rank: int
    alpha: int  # their output is multiplied by alpha / rank
    targets: tuple[str, ...]  # names of layers, such as q_proj, or "all-linear"
    seed: int  # of their first weights, the same in every process
