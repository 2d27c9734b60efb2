"""Configuration of an evaluation, checked without loading torch."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from student_train.run.config import SAVE_DTYPES
from teacher_cache.format import CachePath
from teacher_cache.terminal.option import check_options, option

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What both engines need to know of a command that generates; see its options."""

    model: str
    engine: str
    dtype: str | None
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int
    with_logprobs: bool  # whether the model's own logprobs are wanted

    @classmethod
    def of(cls, config: object, *, with_logprobs: bool = False) -> "Generation":
        """Those of a command's options that have these names."""
        names = [item.name for item in fields(cls) if item.name != "with_logprobs"]
        return cls(**{n: getattr(config, n) for n in names}, with_logprobs=with_logprobs)


_measured = partial(option, group="What is measured")
_sampling = partial(option, group="Sampling")
_output = partial(option, group="Output")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation by generation."""

    model: str = _measured("Model folder or hub id.", basic=True)
    prompts: Path = _measured(
        "Held-out rows with prompt or messages, and answer: a file (JSONL, JSON, Parquet, Arrow; "
        "plain or compressed), a folder, a saved dataset or a hub id.",
        basic=True,
    )
    cache: CachePath | None = _measured(
        "Cache of held-out traces: measure KL to the teacher and NLL on all of each, by section.",
        default=None,
        basic=True,
    )
    limit: int | None = _measured(
        "Largest number of prompts to use, in order.", default=None, at_least=1, unset="all"
    )
    group_by: str | None = _measured(
        "Column of the prompts; accuracy is also given for each of its values.", default=None
    )
    think_open: str = _measured(
        "Mark that opens the chain of thought; one that is never closed leaves no answer.",
        default="<think>",
        can_be_empty=True,
    )
    think_close: str = _measured(
        "Mark that closes the chain of thought; the answer follows the last one. An empty text "
        "takes the whole completion.",
        default="</think>",
        can_be_empty=True,
    )
    engine: str = _sampling(
        "Program that generates; vllm must be installed, and pays off for many prompts or a large "
        "student.",
        default="transformers",
        basic=True,
        choices=ENGINES,
    )
    dtype: str | None = _sampling(
        "Dtype of weights and products while answers are generated.",
        default=None,
        choices=SAVE_DTYPES,
        unset="as stored; bfloat16 on a GPU where float32 is stored",
    )
    samples_per_prompt: int = _sampling(
        "Answers per prompt, for avg@n; needs a temperature.", default=1, basic=True, at_least=1
    )
    max_new_tokens: int = _sampling(
        "Largest number of tokens to generate; a longer answer counts as unfinished.",
        default=512,
        basic=True,
        at_least=1,
    )
    temperature: float = _sampling(
        "Sampling temperature; 0 takes the most probable token.",
        default=0.0,
        basic=True,
        at_least=0,
    )
    top_p: float = _sampling(
        "Sample from the most probable tokens that reach this probability.",
        default=1.0,
        above=0,
        at_most=1,
    )
    seed: int = _sampling("Seed for sampling.", default=0)
    batch_size: int = _sampling(
        "Prompts per batch of the transformers engine; lower it when memory runs out.",
        default=32,
        at_least=1,
    )
    completions: Path | None = _output(
        "JSONL file for every completion and its verdict, written as they come; the same command "
        "resumes it after a stop.",
        default=None,
        basic=True,
    )
    force: bool = _output("Start the file of completions anew, whatever it holds.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.samples_per_prompt > 1 and self.temperature == 0.0:
            raise ValueError(
                f"--samples-per-prompt: {self.samples_per_prompt} answers at temperature 0 would "
                "be the same; give --temperature"
            )
