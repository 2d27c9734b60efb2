"""The interface of a teacher: requests in, rows of logprobs out.

Letters: R rows (tokens with a distribution), K kept candidates per row.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class EngineError(Exception):
    """The teacher cannot do what it was asked; the message says what to change."""


class EngineStartError(EngineError):
    """The engine's own process ended before it was ready; its output says why."""


class EngineDiedError(EngineError):
    """The teacher's processes died; a new teacher may continue."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Captured logprobs never depend on them: they stay at temperature 1.

    `top_k` here is the sampler's cut-off (0 for none), not the number of kept entries.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: Sample from the most probable tokens that reach this probability.
        top_k: Sample from this many most probable tokens; 0 for all.
        min_p: Sample from tokens at least this many times as probable as the most probable one.
        repetition_penalty: Divides the logits of earlier tokens, or
            multiplies them if they are negative.
        stop_ids: Tokens that end a trace, besides those of the tokenizer and generation config.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TeacherRequest:
    """One trace to generate or score.

    With `max_new_tokens` = 0 `token_ids` is a whole trace and is only scored; otherwise it is the
    prompt, and at most that many tokens are generated after it.
    """

    request_id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int  # 0 <= seed < 2**63
    capture_prompt: bool  # rows for the given tokens too (always true when scoring)
    first_row: int = 1  # when scoring, the first token that needs a row; earlier ones may have one


@dataclass(frozen=True)
class TeacherRows:
    """A finished trace and the teacher's distributions over its tokens.

    Row r belongs to token `first_row + r` and is the distribution over *that* token given the
    tokens before it. Column 0 is the token itself; columns 1..K are the K most probable tokens,
    most probable first (the token itself may be among them again).
    """

    request_id: str
    token_ids: NDArray[np.int32]  # [n] prompt and generated tokens
    num_given: int  # number of them given in the request
    first_row: int  # of a generated trace 1 if the given tokens have rows, else num_given
    row_ids: NDArray[np.int32]  # [R, 1 + K]
    row_logprobs: NDArray[np.float32]  # [R, 1 + K] nats, temperature 1, over the whole vocabulary
    finish_reason: str  # "stop" or "length" when generated, "scored" otherwise
    # [R] logarithms of the mass outside the K candidates, where the engine summed that mass itself:
    # exact, however small. NaN for a row of which the candidates alone are known; None for all.
    row_tails: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TeacherFacts:
    """Origin of a teacher's numbers; written into the header of every cache."""

    engine: str  # "vllm" or "transformers"
    engine_version: str
    dtype: str  # of weights and activations
    head_dtype: str  # of the logits
    vocab_size: int  # width of the softmax, padding included
    max_model_len: int  # tokens in a trace, prompt included
    # Everything else that changes its numbers, as the engine reports it: JSON values by name.
    settings: Mapping[str, object] = field(default_factory=dict)


class Teacher(Protocol):
    """An engine that runs one model.

    `run` draws from `requests` only as far as its window of requests in flight allows, and yields
    traces as they finish, in any order. After `requests` ends it may have more later: an engine
    with traces in flight asks again. `run` raises `EngineError` for a request it cannot run,
    which abandons the others in flight. One run at a time.
    """

    facts: TeacherFacts

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request."""
        ...

    def close(self) -> None:
        """Free the model and its processes."""
        ...
