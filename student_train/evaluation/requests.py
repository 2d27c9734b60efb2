"""Requests to a student: the prompts' tokens, and the room that each leaves for an answer."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from student_train.evaluation.config import EvaluateConfig, Generation
from student_train.evaluation.prompts import Prompt, prompt_ids, prompts_fingerprint
from student_train.model.load import model_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One prompt, to be completed once per sample."""

    ids: tuple[int, ...]
    num_new_tokens: int  # at most, so that all has a position


@dataclass(frozen=True)
class Tokens:
    """What a model wrote after a prompt."""

    ids: tuple[int, ...]  # the end token included
    finished: bool  # whether it ended by itself
    logprobs: tuple[float, ...] | None = None  # of each token, nats, temperature 1; if wanted


def make_requests(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], config: Generation
) -> list[Request]:
    """Turn prompts into requests, the same for every engine.

    Raises:
        ValueError: If a prompt leaves no position for an answer; it names file and row.
    """
    num_positions = positions_of(config.model)
    requests, num_short = [], 0
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        if not ids:
            raise ValueError(f"{prompt.where}: the prompt has no tokens")
        room = config.max_new_tokens
        if num_positions is not None:
            if len(ids) >= num_positions:
                raise ValueError(
                    f"{prompt.where}: the prompt's {len(ids):,} tokens leave no room for an answer "
                    f"in the model's {num_positions:,} positions"
                )
            room = min(room, num_positions - len(ids))
        num_short += room < config.max_new_tokens
        requests.append(Request(tuple(ids), room))
    if num_short:
        logger.info(
            "%d of %d prompts leave less than %d tokens for an answer in the model's %d positions",
            num_short, len(requests), config.max_new_tokens, num_positions,
        )  # fmt: skip
    return requests


def positions_of(model: str) -> int | None:
    """Number of positions in a model's configuration; None where it names none."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    number = getattr(config, "max_position_embeddings", None)
    return None if number is None else int(number)


def settings_of(
    config: EvaluateConfig, prompts: Sequence[Prompt], end_ids: Sequence[int], checker: str
) -> dict[str, Any]:
    """Everything that completions and their verdicts depend on."""
    return generation_settings(Generation.of(config), prompts) | {
        "checker": checker,
        "end_ids": sorted(end_ids),
        "think_open": config.think_open,
        "think_close": config.think_close,
    }


def generation_settings(config: Generation, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that generated tokens depend on."""
    names = ["engine", "dtype", "samples_per_prompt", "max_new_tokens"]
    names += ["temperature", "top_p", "seed"]
    if config.engine == "transformers":
        names.append("batch_size")  # draws and rounding depend on it
    return {
        "model": model_fingerprint(config.model),
        "prompts": prompts_fingerprint(prompts),
        "num_prompts": len(prompts),
        **{name: getattr(config, name) for name in names},
    }


def draw_seed(*parts: int) -> int:
    """Seed for one draw, from the evaluation's seed and the draw's place."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
