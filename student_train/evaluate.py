"""What a student can do: answers generated, compared with the right ones, and counted."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from student_train.config import EvaluateConfig
from student_train.student import load_model

_Z_95 = 1.959963984540054  # standard normal quantile at 0.975


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts file."""

    text: str | None
    messages: list[dict[str, Any]] | None
    answer: str


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str  # special tokens included
    num_tokens: int  # the end token included
    finished: bool  # whether it ended by itself


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation."""

    model: str
    num_prompts: int
    num_right: int
    accuracy: float
    accuracy_low: float  # Wilson interval of 95 %
    accuracy_high: float
    mean_tokens: float  # generated, per prompt
    unfinished_share: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1%} (95 %: {self.accuracy_low:.1%} to "
            f"{self.accuracy_high:.1%}), {self.num_right:,} of {self.num_prompts:,} right | "
            f"mean length {self.mean_tokens:.1f} tokens | {self.unfinished_share:.1%} unfinished"
        )


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Generate an answer to every prompt and count the right ones.

    Raises:
        ValueError: If the model cannot be loaded, or a prompt line is wrong (file and line).
    """
    prompts = list(islice(read_prompts(config.prompts), config.limit))
    if not prompts:
        raise ValueError(f"{config.prompts}: expected at least one prompt, found none")
    model, tokenizer = load_model(config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    prompt_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    completions = generate(model, tokenizer, prompt_ids, config)
    num_right = sum(
        is_right(extract_answer(done.text, config.think_close, tokenizer.all_special_tokens), want)
        for done, want in zip(completions, (prompt.answer for prompt in prompts), strict=True)
    )
    low, high = wilson_interval(num_right, len(prompts))
    return Evaluation(
        model=config.model,
        num_prompts=len(prompts),
        num_right=num_right,
        accuracy=num_right / len(prompts),
        accuracy_low=low,
        accuracy_high=high,
        mean_tokens=sum(done.num_tokens for done in completions) / len(prompts),
        unfinished_share=sum(not done.finished for done in completions) / len(prompts),
    )


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts of a JSONL file, blank lines left out.

    Raises:
        ValueError: Naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file of prompts, found none")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_prompt(line, f"{path}:{number}")


def _parse_prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    text, messages = record.get("prompt"), record.get("messages")
    if not (isinstance(text, str) and text) and not (isinstance(messages, list) and messages):
        raise ValueError(f"{where}: expected a text `prompt` or a list `messages`, not empty")
    answer = record.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(f"{where}: expected an `answer`, a text or a number, got {answer!r}")
    if isinstance(messages, list) and messages:
        return Prompt(None, messages, str(answer))
    return Prompt(text, None, str(answer))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if prompt.messages is None:
        ids: list[int] = tokenizer(prompt.text)["input_ids"]
        return ids
    text = tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
) -> list[Completion]:
    """Complete every prompt, in batches of similar length.

    Args:
        model: Causal language model, in evaluation mode.
        tokenizer: Of the model.
        prompts: Token ids.
        config: How.

    Returns:
        One completion per prompt, in their order.
    """
    torch.manual_seed(config.seed)
    end_ids = model.generation_config.eos_token_id
    end_ids = {end_ids} if isinstance(end_ids, int) else set(end_ids or ())
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature}
    done: dict[int, Completion] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), config.batch_size):
        group = by_length[start : start + config.batch_size]
        longest = len(prompts[group[-1]])
        # On the left, so that every prompt ends where the generation begins.
        rows = [[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in group]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=config.max_tokens,
                pad_token_id=pad_id,
                top_k=None,
                top_p=None,
                **sampling,
            )
        for index, ids in zip(group, output[:, longest:].tolist(), strict=True):
            done[index] = _completion(tokenizer, ids, end_ids)
    return [done[index] for index in range(len(prompts))]


def _completion(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: set[int]
) -> Completion:
    """Cut what the batch padded behind the end token."""
    end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), None)
    kept = ids[:end]
    text = str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
    return Completion(text, len(kept), finished=end is not None)


def extract_answer(text: str, think_close: str, special_tokens: Sequence[str]) -> str:
    """What follows the last closing mark, or all where there is none, without special tokens."""
    answer = text.rpartition(think_close)[2] if think_close else text
    for token in special_tokens:
        answer = answer.replace(token, "")
    return answer.strip()


def is_right(found: str, wanted: str) -> bool:
    """Whether two answers are the same text, or numbers of the same value."""
    if found.strip() == wanted.strip():
        return True
    numbers = [_number(found), _number(wanted)]
    return None not in numbers and numbers[0] == numbers[1]


def _number(text: str) -> float | None:
    plain = text.strip().replace(",", "")
    return float(plain) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", plain) else None


def wilson_interval(num_right: int, num_all: int) -> tuple[float, float]:
    """Score interval of 95 % for a proportion (Wilson 1927).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        num_right: Successes.
        num_all: Trials, at least 1.
    """
    share = num_right / num_all
    z2 = _Z_95**2
    centre = share + z2 / (2 * num_all)
    spread = _Z_95 * math.sqrt(share * (1 - share) / num_all + z2 / (4 * num_all**2))
    scale = 1 + z2 / num_all
    low = (centre - spread) / scale if num_right else 0.0  # exactly, where rounding says about
    high = (centre + spread) / scale if num_right < num_all else 1.0
    return low, high
