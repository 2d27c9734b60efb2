"""Where a server is and how much it is asked at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

KEY_VARIABLE = "VLLM_API_KEY"


def server_address(url: str) -> SplitResult:
    """The parts of a server's address; a key in it would end up in messages and records.

    Raises:
        ValueError: If it is no address, or holds credentials, which the message leaves out.
    """
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            "--url: expected http://HOST:PORT alone, got one with credentials or a query; set "
            f"{KEY_VARIABLE} to the key, which is sent as a bearer token"
        )
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"--url: {url!r}: {error}") from error
    if not is_address:
        raise ValueError(f"--url: expected http://HOST:PORT or https://HOST, got {url!r}")
    return parts


@dataclass(frozen=True)
class ServerSettings:
    """A server, and what the capture knows of its teacher.

    Attributes:
        url: Address, `http://host:port`, with or without `/v1`.
        vocab_size: Width of the teacher's softmax.
        probe_ids: Tokens of some text that the teacher has not seen cut off, for the first checks.
        model: The teacher's folder or hub id, whose last part the server's model is to be named.
        decode: The teacher's tokenizer: ids to text, special tokens included.
        served_model: Its name at the server; None if the server has one model alone, of
            the teacher's own name.
        in_flight: Requests sent at once.
        tolerance: Largest mean KL, nats per token, between two answers to the same question.
    """

    url: str
    vocab_size: int
    probe_ids: tuple[int, ...]
    model: str
    decode: Callable[[Sequence[int]], str]
    served_model: str | None = None
    in_flight: int = 64
    tolerance: float = 0.01
