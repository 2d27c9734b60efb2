"""Where a server is and how much it is asked at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """A server, and what the capture knows of its teacher.

    Attributes:
        url: Address, `http://host:port`, with or without `/v1`.
        vocab_size: Width of the teacher's softmax.
        probe_ids: Tokens of some text that the teacher has not seen cut off, for the first checks.
        decode: The teacher's tokenizer: ids to text, special tokens included.
        served_model: Its name at the server; None if the server has one model alone.
        in_flight: Requests sent at once.
        tolerance: Largest mean KL, nats per token, between two answers to the same question.
    """

    url: str
    vocab_size: int
    probe_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    served_model: str | None = None
    in_flight: int = 64
    tolerance: float = 0.01
