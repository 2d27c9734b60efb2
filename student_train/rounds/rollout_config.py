"""Configuration of a rollout, checked without loading torch."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from student_train.evaluation.config import EvaluateConfig
from teacher_cache.terminal.option import check_options, option, same_option

_asked = partial(option, group="What is asked")
_sampling = partial(same_option, EvaluateConfig)
_output = partial(option, group="Output")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """One rollout: a student's own traces of some prompts."""

    model: str = _asked("Student: a run's folder, a model folder or a hub id.", basic=True)
    prompts: Path = _asked(
        "Rows with prompt or messages, as for `cache-teacher generate`; they need no answers.",
        basic=True,
    )
    skip: int = _asked("Number of prompts to leave out at the start.", default=0, at_least=0)
    limit: int | None = _asked(
        "Largest number of prompts to use after those.", default=None, at_least=1, unset="all"
    )
    round: int = _asked(
        "Number of the round, which the traces carry along; 1 for the first.",
        default=1,
        at_least=1,
    )
    engine: str = _sampling("engine")
    dtype: str | None = _sampling("dtype")
    samples_per_prompt: int = _sampling("samples_per_prompt")
    max_new_tokens: int = option(
        "Largest number of tokens to generate; a small one makes short rollouts, the beginnings "
        "of traces.",
        default=512,
        group="Sampling",
        basic=True,
        at_least=1,
    )
    temperature: float = _sampling("temperature", default=1.0)
    top_p: float = _sampling("top_p")
    seed: int = _sampling("seed")
    batch_size: int = _sampling("batch_size")
    out: Path = _output(
        "JSONL file for `cache-teacher score`, written as traces finish; the same command resumes "
        "it after a stop.",
        basic=True,
    )
    force: bool = _output("Start the file anew, whatever it holds.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.samples_per_prompt > 1 and self.temperature == 0.0:
            raise ValueError(
                f"--samples-per-prompt: {self.samples_per_prompt} traces at temperature 0 would "
                "be the same; give --temperature"
            )
