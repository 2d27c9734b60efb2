"""`ServerTeacher`: a vLLM server as a `Teacher`, with many requests in flight.

A server is another's machine: its answers are checked before anything of them is stored. What one
answer tells, `wire` checks; what takes several is tried at the start (`probe`), and again while it
captures: every 64th trace is scored once more, by whichever replica answers.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from teacher_cache.engines import (
    EngineError,
    Sampling,
    TeacherFacts,
    TeacherRequest,
    TeacherRows,
)
from teacher_cache.engines.checks import check_request
from teacher_cache.engines.server.client import Client
from teacher_cache.engines.server.probe import Probe, check_repeat
from teacher_cache.engines.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_REPEAT_EVERY = 64  # traces: 1.6 % more work at most, prefill alone
_LOOK_UP_S = 1.0  # for signals, which a waiting thread does not see everywhere


class ServerTeacher:
    """A model behind a vLLM server.

    Args:
        settings: The server.
        top_k: Candidates per row (K).
        max_model_len: Tokens in the longest trace, prompt included.
        sampling: Settings for drawing new tokens; None for a server that only scores.

    Raises:
        EngineError: If the server does not answer, does not give what is needed (ids, K logprobs,
            room for the longest trace), or one of the first checks finds it wrong.
    """

    facts: TeacherFacts

    def __init__(
        self,
        settings: ServerSettings,
        *,
        top_k: int,
        max_model_len: int,
        sampling: Sampling | None = None,
    ) -> None:
        self._client = Client(settings.url)
        self._settings = settings
        self._sampling = sampling
        try:
            found = Probe(self._client, settings, top_k, max_model_len, sampling).run()
        except BaseException:
            self._client.close()
            raise
        self._wire = found.wire
        self._can_score = found.can_score
        self._pool = ThreadPoolExecutor(settings.in_flight, thread_name_prefix="server")
        self._serial = itertools.count(1)
        self.facts = TeacherFacts(
            engine="server",
            engine_version=found.version,
            dtype="unknown",
            head_dtype="unknown",
            vocab_size=settings.vocab_size,
            max_model_len=max_model_len,
            settings={"served_model": found.wire.model, "api": found.wire.path},
        )

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request; traces are yielded as they are answered.

        Raises:
            EngineError: If a request is refused, or an answer is wrong. Requests in flight are
                abandoned.
        """
        source = iter(requests)
        in_flight: set[Future[TeacherRows]] = set()
        try:
            while True:
                room = self._settings.in_flight - len(in_flight)
                for request in itertools.islice(source, room):
                    self._check(request)
                    in_flight.add(self._pool.submit(self._answered, request, next(self._serial)))
                if not in_flight:
                    return
                done, in_flight = wait(in_flight, _LOOK_UP_S, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in in_flight:
                future.cancel()

    def close(self) -> None:
        """Give up requests that wait; answers of those on their way are dropped."""
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, request: TeacherRequest) -> None:
        check_request(
            request,
            vocab_size=self.facts.vocab_size,
            max_model_len=self.facts.max_model_len,
            sampling=self._sampling,
        )
        needs_prompt = request.max_new_tokens == 0 or request.capture_prompt
        if needs_prompt and not self._can_score:
            raise EngineError(
                f"{self._settings.url}: the server gives no prompt_logprobs, which scoring and "
                "--capture-prompt need"
            )

    def _answered(self, request: TeacherRequest, number: int) -> TeacherRows:
        body = self._wire.body(request, self._sampling)
        rows = self._wire.rows(request, self._client.post(self._wire.path, body))
        if number % _REPEAT_EVERY == 0 and self._can_score:
            again = TeacherRequest(
                request.request_id, tuple(rows.token_ids.tolist()), 0, 0, capture_prompt=True
            )
            if len(again.token_ids) < self.facts.max_model_len:  # it is scored with one token more
                answer = self._client.post(self._wire.path, self._wire.body(again, None))
                repeated = self._wire.rows(again, answer)
                check_repeat(self._settings, rows, repeated, f"request {request.request_id!r}")
        return rows
