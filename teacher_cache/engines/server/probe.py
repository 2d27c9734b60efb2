"""The first questions to a server: what it gives, and whether it can be believed."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.engines import EngineError, Sampling, TeacherRequest, TeacherRows
from teacher_cache.engines.server.client import Client, RefusedError
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.engines.server.wire import COMPLETIONS, GENERATE, Wire

logger = logging.getLogger(__name__)

_NUM_REPEATS = 8  # at once: replicas behind one address answer some each
_NUM_DRAWN = 12  # tokens of the probes
# An endpoint that the server does not have, or has closed to this key; the other may answer.
_NOT_THERE = (401, 403, 404, 405, 501)
_BAD_REQUEST = (400, 422)  # one with more logprobs than the server gives is among them
_UNSURE = np.log(0.9)  # rows whose best logprob is below it have a tail
_RENORMALISED = 1e-6
_FEWEST_UNSURE = 4
_HOT, _COLD = Sampling(1.0, 1.0, 0), Sampling(0.25, 1.0, 2)


@dataclass(frozen=True)
class Found:
    """What a server gives.

    Attributes:
        wire: How it is asked.
        version: Its own version.
        can_score: Whether it gives the logprobs of a prompt.
    """

    wire: Wire
    version: str
    can_score: bool


@dataclass(frozen=True)
class Probe:
    """The questions, in order; each error says what to change."""

    client: Client
    settings: ServerSettings
    top_k: int
    max_model_len: int
    sampling: Sampling | None

    def run(self) -> Found:
        """Ask them all.

        Raises:
            EngineError: If the server cannot be used, or what it says of itself is not so.
        """
        model, version = self._model(), self._version()
        wire, drawn = self._wire(model)
        self._check_text(wire)
        can_score = self._check_scoring(wire)
        if self.sampling is None and not can_score:
            raise EngineError(f"{self.client.url}: the server gives no prompt_logprobs to score by")
        self._check_replicas(wire, can_score=can_score)
        self._check_raw(wire, drawn)
        logger.info("%s: %s, vLLM %s, through %s", self.client.url, model, version, wire.path)
        return Found(wire, version, can_score)

    def _model(self) -> str:
        """The served model's name; refuses another model, and a context that is too short."""
        models = {str(m["id"]): m for m in self._models() if isinstance(m, dict) and "id" in m}
        name = self.settings.served_model
        if not models:
            raise EngineError(f"{self.client.url}: serves no model yet; wait until it has loaded")
        if name is None and len(models) == 1:
            name = next(iter(models))
            self._require_name(name, models[name].get("root"))
        if name not in models:
            raise EngineError(
                f"{self.client.url}: serves {', '.join(models)}; name one with --served-model"
            )
        context = models[name].get("max_model_len")
        needed = self.max_model_len + (self.sampling is None)  # a trace is scored with one more
        if isinstance(context, int) and context < needed:
            raise EngineError(
                f"{self.client.url}: the server's context holds {context} tokens, the longest "
                f"trace needs {needed}: serve with --max-model-len {needed}, or capture with a "
                "smaller --max-model-len"
            )
        return name

    def _require_name(self, name: str, root: object) -> None:
        """Refuse a model that is not called as the teacher: its tokenizer may be the same."""
        model = self.settings.model
        own = {_last_part(model), _last_part(str(Path(model).resolve()))}
        if own.isdisjoint({_last_part(name), _last_part(str(root))}):
            made_from = f" (made from {root})" if isinstance(root, str) and root != name else ""
            raise EngineError(
                f"{self.client.url}: serves {name}{made_from}, --model is {model}: it seems to be "
                f"another model. If it is the same one, say so with --served-model {name}"
            )

    def _models(self) -> list[Any]:
        models = self.client.get("/v1/models").get("data")
        return models if isinstance(models, list) else []

    def _version(self) -> str:
        try:
            return str(self.client.get("/version").get("version", "unknown"))
        except RefusedError:
            return "unknown"  # a provider that is not vLLM itself

    def _request(self, *, max_new_tokens: int) -> TeacherRequest:
        return TeacherRequest(
            "probe", self.settings.probe_ids, max_new_tokens, seed=1, capture_prompt=False
        )

    def _ask(
        self, wire: Wire, request: TeacherRequest, sampling: Sampling | None
    ) -> tuple[TeacherRows, Mapping[str, Any]]:
        answer = self.client.post(wire.path, wire.body(request, sampling))
        return wire.rows(request, answer), answer

    def _wire(self, model: str) -> tuple[Wire, TeacherRows]:
        """The endpoint that answers, with one more candidate than K if the server gives it."""
        refused: RefusedError | None = None
        request = self._request(max_new_tokens=1)
        for path in (GENERATE, COMPLETIONS):
            for num_asked in (min(self.top_k + 1, self.settings.vocab_size), self.top_k):
                wire = Wire(path, model, self.top_k, num_asked, self.settings.vocab_size)
                try:
                    return wire, self._ask(wire, request, _HOT)[0]
                except RefusedError as error:
                    if error.status not in (*_NOT_THERE, *_BAD_REQUEST):
                        raise
                    if refused is None or not (
                        refused.status in _BAD_REQUEST and error.status in _NOT_THERE
                    ):
                        refused = error  # of the endpoint that was there
                    if error.status in _NOT_THERE:
                        break
        if refused is None or not _is_of_logprobs(refused):
            raise EngineError(str(refused)) from refused
        raise EngineError(
            f"{refused}. --top-k {self.top_k} needs a server that gives as many logprobs (vllm "
            f"serve --max-logprobs {self.top_k + 1}), or a lower --top-k"
        ) from refused

    def _check_text(self, wire: Wire) -> None:
        """Compare the server's text of drawn tokens with the tokenizer's: ids alone echo back."""
        as_text = replace(wire, path=COMPLETIONS)
        request = self._request(max_new_tokens=_NUM_DRAWN)
        body = as_text.body(request, Sampling(0.0, 1.0, 0)) | {"ignore_eos": True}
        try:
            answer = self.client.post(COMPLETIONS, body)
        except RefusedError as error:
            raise EngineError(
                f"{error}: without {COMPLETIONS} nothing tells whether the server has this "
                "teacher's tokenizer"
            ) from error
        rows = as_text.rows(request, answer)
        own = self.settings.decode(rows.token_ids[rows.num_given :].tolist()).strip()
        text = str(answer["choices"][0].get("text") or "").strip()
        # Either may end in half a character.
        shared = min(len(text.rstrip("\ufffd")), len(own.rstrip("\ufffd")))
        if not shared:
            raise EngineError(
                f"{self.client.url}: the server's text of drawn tokens, {text[:60]!r}, cannot be "
                f"compared with what --model's tokenizer writes, {own[:60]!r}: nothing tells "
                "whether it is this teacher"
            )
        if text[:shared] != own[:shared]:
            raise EngineError(
                f"{self.client.url}: the server writes tokens as {text[:60]!r} that --model's "
                f"tokenizer writes as {own[:60]!r}: it is another model"
            )

    def _check_scoring(self, wire: Wire) -> bool:
        """Whether the server gives prompt logprobs; those of a prompt are looked at too."""
        try:
            rows, _ = self._ask(wire, self._request(max_new_tokens=0), None)
        except RefusedError as error:
            logger.info("%s: no prompt_logprobs (%s)", self.client.url, error)
            return False
        except EngineError as error:
            if "prompt_logprobs" not in str(error):
                raise
            logger.info("%s: no prompt_logprobs (%s)", self.client.url, error)
            return False
        self._check_tails(rows)
        return True

    def _check_tails(self, rows: TeacherRows) -> None:
        """Refuse rows that were divided by their sums."""
        if self.top_k >= self.settings.vocab_size:
            return
        probabilities = np.exp(rows.row_logprobs.astype(np.float64))
        is_apart = ~(rows.row_ids[:, :1] == rows.row_ids[:, 1:]).any(axis=1)
        sums = probabilities[:, 1:].sum(axis=1) + np.where(is_apart, probabilities[:, 0], 0)
        sums = sums[rows.row_logprobs[:, 1] < _UNSURE]
        if len(sums) >= _FEWEST_UNSURE and (np.abs(sums - 1) < _RENORMALISED).all():
            raise EngineError(
                f"{self.client.url}: the {self.top_k} candidates of every row add up to 1 exactly: "
                "the server renormalises them, and the mass outside is lost"
            )

    def _check_raw(self, wire: Wire, hot: TeacherRows) -> None:
        """Ask for the same token under other sampling: its row must not change."""
        try:
            cold, _ = self._ask(wire, self._request(max_new_tokens=1), _COLD)
        except RefusedError:
            raise
        except EngineError as error:
            raise EngineError(
                f"{self.client.url}: with top-k 2 its logprobs are not those it gave before "
                f"({error}): they are processed. Serve with --logprobs-mode raw_logprobs"
            ) from error
        distance = _mean_kl(hot, cold)
        if not distance <= self.settings.tolerance:
            raise EngineError(
                f"{self.client.url}: its logprobs change with temperature and top-k (by "
                f"{distance:.3g} nats): they are processed. Serve with --logprobs-mode raw_logprobs"
            )

    def _check_replicas(self, wire: Wire, *, can_score: bool) -> None:
        """Ask the same at once, several times: replicas that differ are several teachers."""
        request = self._request(max_new_tokens=0 if can_score else 1)
        with ThreadPoolExecutor(_NUM_REPEATS) as pool:
            asked = [
                pool.submit(self._ask, wire, request, None if can_score else _HOT)
                for _ in range(_NUM_REPEATS)
            ]
            answers = [each.result()[0] for each in asked]
        for answer in answers[1:]:
            check_repeat(self.settings, answers[0], answer, "the first checks")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _is_of_logprobs(refused: RefusedError) -> bool:
    """Whether a request was refused for the number of its logprobs."""
    return refused.status in _BAD_REQUEST and "logprob" in refused.said.casefold()


def check_repeat(
    settings: ServerSettings, rows: TeacherRows, repeated: TeacherRows, where: str
) -> None:
    """Refuse two answers about the same tokens that differ by more than the tolerance.

    Raises:
        EngineError: If they do: replicas of several models, quantisations or versions.
    """
    distance = _mean_kl(rows, repeated)
    if not distance <= settings.tolerance:
        raise EngineError(
            f"{settings.url}: {where}: two answers to the same question differ by {distance:.3g} "
            f"nats per token in the mean, {settings.tolerance:g} allowed: replicas disagree. Give "
            "the address of one of them, or raise --server-tolerance to what you accept"
        )


def _mean_kl(rows: TeacherRows, other: TeacherRows) -> float:
    """Mean KL between the rows of the tokens that both have, over shared ids and one bucket.

    Drawn tokens may differ from some point on: rows are compared while their context is equal.
    """
    first = max(rows.first_row, other.first_row)
    end = min(len(rows.token_ids), len(other.token_ids))
    parted = np.flatnonzero(rows.token_ids[:end] != other.token_ids[:end])
    end = min(end, int(parted[0]) + 1) if len(parted) else end
    total = [
        _kl(
            _entries(rows, position),
            _entries(other, position),
        )
        for position in range(first, end)
    ]
    return float(np.mean(total)) if total else 0.0


def _entries(rows: TeacherRows, position: int) -> dict[int, float]:
    number = position - rows.first_row
    ids, values = rows.row_ids[number, 1:].tolist(), rows.row_logprobs[number, 1:].tolist()
    return {i: v for i, v in zip(ids, values, strict=True) if v > -np.inf}


def _kl(entries: dict[int, float], other: dict[int, float]) -> float:
    shared = [token for token in entries if token in other]
    p = np.exp(np.array([entries[token] for token in shared], np.float64))
    q = np.exp(np.array([other[token] for token in shared], np.float64))
    rest_p, rest_q = (max(1 - float(each.sum()), 1e-7) for each in (p, q))
    return float((p * np.log(p / q)).sum() + rest_p * np.log(rest_p / rest_q))
