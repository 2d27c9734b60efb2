"""Figures of an evaluation: shares of right answers with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from student_train.evaluation.completions import Sample
from student_train.evaluation.intervals import clustered_interval

if TYPE_CHECKING:  # it loads torch
    from student_train.model.heldout import SectionFigures


@dataclass(frozen=True)
class Answers:
    """Figures of generated answers, of all prompts or of one group."""

    num_prompts: int
    num_samples: int  # per prompt
    num_right: int
    accuracy: float  # avg@n: mean over prompts of the share of right samples
    accuracy_low: float  # 95 %, clustered by prompt; see `intervals`
    accuracy_high: float
    mean_tokens: float  # generated, per sample
    unfinished_share: float  # that did not end within their number of tokens
    unclosed_share: float  # whose chain of thought was opened and never closed: no answer
    num_beyond_limits: int  # answers too long or too costly to compare, counted as wrong

    @classmethod
    def of(cls, samples: Sequence[Sample], num_samples: int) -> "Answers":
        """Count samples, `num_samples` of each prompt."""
        num_right: dict[int, int] = {}
        for sample in samples:
            num_right[sample.prompt] = num_right.get(sample.prompt, 0) + sample.right
        low, high = clustered_interval(list(num_right.values()), num_samples)
        count = len(samples)
        return cls(
            num_prompts=len(num_right),
            num_samples=num_samples,
            num_right=sum(num_right.values()),
            accuracy=sum(num_right.values()) / count,
            accuracy_low=low,
            accuracy_high=high,
            mean_tokens=sum(sample.completion.num_tokens for sample in samples) / count,
            unfinished_share=sum(not sample.completion.finished for sample in samples) / count,
            unclosed_share=sum(not sample.closed for sample in samples) / count,
            num_beyond_limits=sum(s.compared_as == "beyond limits" for s in samples),
        )

    def __str__(self) -> str:
        name = "accuracy" if self.num_samples == 1 else f"avg@{self.num_samples}"
        return (
            f"{name} {self.accuracy:.1%} (95 %: {self.accuracy_low:.1%} to "
            f"{self.accuracy_high:.1%}), {self.num_right:,} of "
            f"{self.num_prompts * self.num_samples:,} right | mean length "
            f"{self.mean_tokens:.1f} tokens | {self.unfinished_share:.1%} unfinished, "
            f"{self.unclosed_share:.1%} with unclosed thinking"
        )


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation."""

    model: str
    checker: str  # how answers were compared
    answers: Answers
    groups: Mapping[str, Answers]
    heldout: "Mapping[str, SectionFigures]"  # by section; empty without a cache

    def __str__(self) -> str:
        lines = [str(self.answers), f"  compared by {self.checker}"]
        if self.answers.num_beyond_limits:
            lines.append(
                f"  {self.answers.num_beyond_limits:,} answers were too long or too costly to "
                "compare and count as wrong"
            )
        lines += [
            f"  {group}: {g.accuracy:.1%} ({g.accuracy_low:.1%} to {g.accuracy_high:.1%}) of "
            f"{g.num_prompts:,}"
            for group, g in self.groups.items()
        ]
        lines += [
            f"  held-out {section}: KL {f.kl:.4f}, NLL {f.nll:.4f} nats, top-1 "
            f"{f.top1_agreement:.1%}, {f.num_tokens:,} tokens"
            for section, f in self.heldout.items()
        ]
        return "\n".join(lines)
