"""Predicted time and memory of the loss on a card, from floating-point operations and bytes.

Ceilings are those of large products and copies on such cards; nothing of this is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU, by what bounds the loss on it."""

    bytes_per_s: float  # of a large copy, read and written together
    fastest_flops: float = 790e12  # per second, of large bfloat16 products
    slowest_flops: float = 700e12


CARDS = {"H100": Card(3.0e12), "H200": Card(4.3e12)}


@dataclass(frozen=True)
class Prediction:
    """Parts of one forward and backward in milliseconds, and memory above the inputs."""

    products_ms: tuple[float, float]  # at the fastest and the slowest rate
    sweeps_ms: float  # the row kernel: logits read twice, gradients written
    weight_gradient_ms: float  # read and written once per product; hidden behind it at best
    cast_ms: float  # the weight's gradient to bfloat16
    extra_gib: float

    @property
    def range_ms(self) -> tuple[float, float]:
        """At best and at worst."""
        shared = self.sweeps_ms + self.cast_ms
        fast, slow = self.products_ms
        return fast + shared, slow + shared + self.weight_gradient_ms


def predict(
    card: Card,
    *,
    tokens: int,
    hidden: int,
    vocab: int,
    rows_per_product: int = 2048,
    buffer_bytes: int = 896 * 2**20,
) -> Prediction:
    """Predict bfloat16 operands with a float32 sum of the weight's gradient.

    Args:
        card: Where.
        tokens: N.
        hidden: D.
        vocab: V.
        rows_per_product: Rows whose gradients are multiplied together.
        buffer_bytes: Bound on logits and gradients of chunks.
    """
    flops = 6 * tokens * hidden * vocab
    num_products = -(-tokens // rows_per_product)
    weight = vocab * hidden

    def ms(num_bytes: float) -> float:
        return 1e3 * num_bytes / card.bytes_per_s

    return Prediction(
        products_ms=(1e3 * flops / card.fastest_flops, 1e3 * flops / card.slowest_flops),
        sweeps_ms=ms(tokens * vocab * (4 + 4 + 2)),
        weight_gradient_ms=ms(num_products * weight * 8),
        cast_ms=ms(weight * 6),
        extra_gib=(weight * 4 + max(buffer_bytes, weight * 2) + 2 * tokens * hidden) / GIB,
    )
