"""Objective that a run minimises per token, with its impossible combinations. No torch here."""

import math
from dataclasses import dataclass

# The default of `mix` for the divergences that have one.
DEFAULT_MIXES = {"combined_kl": 0.5, "jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "combined_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
)
TAILS = ("bucket", "renormalise", "zero")


@dataclass(frozen=True)
class Objective:
    """Objective per token: (1 - ce_weight) T^2 D(p, q) + ce_weight CE.

    p is the teacher, q the student, T the temperature, and D one of:

    | divergence | D | mix x |
    | --- | --- | --- |
    | forward_kl | KL(p, q) | |
    | reverse_kl | KL(q, p) | |
    | combined_kl | x KL(p, q) + (1 - x) KL(q, p) | 0.5 |
    | jsd | x KL(p, m) + (1 - x) KL(q, m), m = x p + (1 - x) q | 0.5 |
    | skew_kl | KL(p, x p + (1 - x) q) | 0.1 |
    | skew_reverse_kl | KL(q, x q + (1 - x) p) | 0.1 |
    | tvd | sum of abs(p - q) / 2 | |

    jsd is that of Agarwal et al. (arXiv 2306.13649), the skew divergences those of Ko et al.
    (arXiv 2402.03898). A token without a distribution has ce_weight CE alone.

    Whatever lies outside the kept entries is, by `tail`:

    - bucket: one more outcome of both, with the stored mass and the student's mass there. A lower
      bound of the divergence over the whole vocabulary (data-processing inequality).
    - renormalise: impossible under the teacher, whose kept entries are renormalised to sum to one;
      the student keeps its whole vocabulary.
    - zero: left out of the sum, sum_i p_i log(p_i / q_i) over the kept entries with their stored
      probabilities. P (KL + log P), KL that of renormalise and P the teacher's kept mass.

    Attributes:
        divergence: One of `DIVERGENCES`.
        mix: x above, in (0, 1); None for its default, and for divergences without one.
        tail: One of `TAILS`.
        temperature: T; both distributions are raised to 1 / T and the divergence multiplied by T^2
            (Hinton et al., arXiv 1503.02531). The cross entropy stays at 1.
        ce_weight: In [0, 1]: 0 is the divergence alone, 1 the cross entropy alone. The default is
            that of arXiv 2512.21002, and of `train-student run`.
        softcap: Logits x become softcap * tanh(x / softcap), after scaling; None for no cap.
        logit_scale: The head's outputs are multiplied by it, before the cap.

    Raises:
        ValueError: If a value is out of range, or the combination is no divergence or cannot be
            determined from what a cache stores.
    """

    divergence: str = "forward_kl"
    mix: float | None = None
    tail: str = "bucket"
    temperature: float = 1.0
    ce_weight: float = 0.5
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.temperature != 1 and self.tail != "renormalise":
            raise ValueError(
                f"temperature {self.temperature} with tail={self.tail!r}: a cache holds the tail's "
                "mass at temperature 1 only, and what it would be at another depends on how it is "
                "spread. Use temperature=1 or tail='renormalise'"
            )
        if self.tail == "renormalise" and self.divergence in ("reverse_kl", "combined_kl"):
            raise ValueError(
                f"{self.divergence} with tail='renormalise' is infinite: the student's mass "
                "outside the kept entries meets no mass of the teacher. Use tail='bucket'"
            )
        if self.tail == "zero" and self.divergence != "forward_kl":
            raise ValueError(
                f"{self.divergence} with tail='zero' is no divergence: the teacher's kept entries "
                "sum to less than one, so its minimum is not at the teacher. Use tail='bucket'"
            )

    def __str__(self) -> str:
        x = self.mix if self.mix is not None else DEFAULT_MIXES.get(self.divergence, 0.0)
        formula = _FORMULAS[self.divergence].format(x=x, y=1 - x)
        text = f"{1 - self.ce_weight:g} {f'({formula})' if ' + ' in formula else formula}"
        text += f" over {_TAIL_TEXTS[self.tail]}"
        if self.temperature != 1:
            text += f", at temperature {self.temperature:g}"
        return f"{text}, + {self.ce_weight:g} cross entropy"

    def _check_ranges(self) -> None:
        if self.divergence not in DIVERGENCES:
            names = ", ".join(DIVERGENCES)
            raise ValueError(f"divergence: expected one of {names}, got {self.divergence!r}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.mix is not None and self.divergence not in DEFAULT_MIXES:
            raise ValueError(f"mix: {self.divergence} has none, got {self.mix}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise ValueError(
                f"mix: expected 0 < mix < 1, got {self.mix}; "
                "for the ends use divergence='forward_kl' or 'reverse_kl'"
            )
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight: expected a share in [0, 1], got {self.ce_weight}")
        for name in ("temperature", "softcap"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale: expected a finite number, got {self.logit_scale}")


DEFAULT_OBJECTIVE = Objective()

_FORMULAS = {
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "combined_kl": "{x:g} KL(teacher || student) + {y:g} KL(student || teacher)",
    "jsd": "JSD of {x:g}",
    "skew_kl": "KL(teacher || {x:g} teacher + {y:g} student)",
    "skew_reverse_kl": "KL(student || {x:g} student + {y:g} teacher)",
    "tvd": "total variation distance",
}
_TAIL_TEXTS = {
    "bucket": "the kept entries and one bucket for the tail",
    "renormalise": "the kept entries, renormalised",
    "zero": "the kept entries, the tail left out",
}
