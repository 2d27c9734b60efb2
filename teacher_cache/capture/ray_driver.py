"""Several engine replicas on a Ray cluster. The only file that imports Ray.

The driver reads the input and hands it out in small units; each actor keeps its own journal and
shards, and only ids and counts come back.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from teacher_cache.capture.job import Job
from teacher_cache.capture.ray_actor import UNIT_TRACES, Place, Replica, Report
from teacher_cache.capture.replica_gpus import ReplicaGpus
from teacher_cache.capture.worker_loop import Done, Work
from teacher_cache.engines import EngineDiedError, EngineError, TeacherFacts
from teacher_cache.engines.checks import one_line
from teacher_cache.format import CacheMismatchError, CacheWriter, open_cache

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 3  # of a worker that makes no progress on its predecessor's traces
_POLL_S = 0.2
_STOPPING_S = 30.0  # for writes in progress
_LOCAL_STORE_BYTES = 128 << 20  # of shared memory: units are small
_NUM_SHOWN = 5


@dataclass(frozen=True)
class ReplicaPlan:
    """Number and location of the replicas."""

    num_workers: int
    address: str | None  # of a running cluster; None to start one on this machine
    gpus: ReplicaGpus  # of each; ignored if the cluster has no GPU


class _DeathError(Exception):
    """A worker's process died."""


@dataclass
class _Worker:
    """The driver's view of a worker: its actor, and its unfinished claims."""

    name: str
    actor: Any
    starting: Any
    opening: Any = None
    working: Any = None
    exchanging: Any = None
    claimed: dict[str, Work] = field(default_factory=dict)
    has_all: bool = False  # nothing more will be handed out
    num_deaths: int = 0
    left: set[str] = field(default_factory=set)  # unfinished at every death so far


class Cluster:
    """The crew of a capture: actors with one engine each, replaced when they die.

    Raises:
        EngineError: If Ray or a teacher cannot be started.
    """

    facts: TeacherFacts

    def __init__(self, placement: ReplicaPlan, job: Job, longest: int) -> None:
        self._job = job
        self._longest = longest
        self._workers: list[_Worker] = []
        self._open = ExitStack()
        # Ray prints its actors' output from a thread; stdout is for results.
        self._open.enter_context(redirect_stdout(sys.stderr))
        try:
            self._ray = _connected(placement.address)
            self._open.callback(self._ray.shutdown)
            self._remote = self._actor_class(placement)
            self._workers = [
                self._begin(_Worker(f"w{number}", None, None))
                for number in range(placement.num_workers)
            ]
            self.facts = self._first_facts()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        writer: CacheWriter,
        note: Callable[[Done], None],
        hold: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Run every request missing from the cache; returns when all are in shards.

        Raises:
            EngineError: If a teacher fails, or a worker dies repeatedly.
            CacheError, OSError: If a worker cannot write; finished traces are kept.
        """
        finished = writer.finished()
        self._work = (item for item in self._job.work() if item[1].request_id not in finished)
        self._note = note
        self._reported: set[str] = set()
        self._header = writer.header
        try:
            while pending := self._pending():
                with hold():
                    ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
                    for ref in ready:
                        worker, handle = pending[ref]
                        try:
                            handle(worker)
                        except _DeathError as death:
                            self._replace(worker, str(death))
        except BaseException:
            self._stop()
            raise
        self._require_all_kept()

    def close(self) -> None:
        """End the actors, and the cluster if it was started for them."""
        with self._open:
            for worker in self._workers:
                self._ray.kill(worker.actor)

    def _actor_class(self, placement: ReplicaPlan) -> Any:  # noqa: ANN401 (Ray is untyped here)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        of_nodes = [int(resources["GPU"]) for resources in nodes if resources.get("GPU")]
        placement.gpus.check(placement.num_workers, of_nodes)
        # Where Ray places vLLM's workers, these hold the GPUs, and their driver none.
        own = 0 if placement.gpus.ray_places or not of_nodes else placement.gpus.number
        return self._ray.remote(Replica).options(
            num_cpus=0,
            num_gpus=own,
            max_concurrency=4,
            scheduling_strategy="SPREAD",
        )

    def _begin(self, worker: _Worker) -> _Worker:
        worker.actor = self._remote.remote(self._job.start_teacher, self._job.tokenizer)
        worker.starting = worker.actor.start.remote(self._longest)
        return worker

    def _first_facts(self) -> TeacherFacts:
        while True:
            starting = {worker.starting: worker for worker in self._workers}
            (ref,), _ = self._ray.wait(list(starting), num_returns=1)
            try:
                facts: TeacherFacts = self._get(ref)
            except _DeathError as death:
                self._replace(starting[ref], str(death))
            else:
                return facts

    def _pending(self) -> dict[Any, tuple[_Worker, Callable[[_Worker], None]]]:
        """Every pending call, and the handler for its answer."""
        pending: dict[Any, tuple[_Worker, Callable[[_Worker], None]]] = {}
        for worker in self._workers:
            for ref, handle in (
                (worker.starting, self._started),
                (worker.opening, self._opened),
                (worker.working, self._worked),
                (worker.exchanging, self._exchanged),
            ):
                if ref is not None:
                    pending[ref] = (worker, handle)
        return pending

    def _started(self, worker: _Worker) -> None:
        facts = self._get(worker.starting)
        if facts != self.facts:
            raise EngineError(
                f"worker {worker.name} runs another teacher: {facts}, not {self.facts}"
            )
        worker.starting = None
        worker.opening = worker.actor.open.remote(self._place(worker), list(worker.claimed))

    def _opened(self, worker: _Worker) -> None:
        for request_id in self._get(worker.opening):  # kept, but not reported before the death
            # Its length and sections are in the journal.
            self._finished(worker, Done(request_id, 0, cut_by_length=False, has_thought=True))
        worker.opening = None
        worker.working = worker.actor.work.remote()
        # Requests that a predecessor left come first.
        unit = list(worker.claimed.values()) or self._claim(worker)
        worker.exchanging = worker.actor.exchange.remote(unit, worker.has_all)

    def _place(self, worker: _Worker) -> Place:
        job = self._job
        return Place(
            out=job.out,
            journal=job.journal,
            header=self._header,
            config=job.config,
            worker=worker.name,
        )

    def _worked(self, worker: _Worker) -> None:
        self._get(worker.working)
        worker.working = None

    def _exchanged(self, worker: _Worker) -> None:
        report: Report = self._get(worker.exchanging)
        for done in report.done:
            self._finished(worker, done)
        if report.done and not worker.left:
            worker.num_deaths = 0
        unit = self._claim(worker) if report.num_waiting < UNIT_TRACES else []
        if worker.claimed or not worker.has_all:
            worker.exchanging = worker.actor.exchange.remote(unit, worker.has_all)
        else:
            worker.exchanging = None

    def _finished(self, worker: _Worker, done: Done) -> None:
        del worker.claimed[done.request_id]
        worker.left.discard(done.request_id)
        self._reported.add(done.request_id)
        self._note(done)

    def _claim(self, worker: _Worker) -> list[Work]:
        unit = [] if worker.has_all else list(islice(self._work, UNIT_TRACES))
        worker.has_all = worker.has_all or len(unit) < UNIT_TRACES
        worker.claimed |= {request.request_id: (source, request) for source, request in unit}
        return unit

    def _get(self, ref: Any) -> Any:  # noqa: ANN401 (Ray is untyped here)
        """An actor's answer; its error is raised as if from here."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, EngineDiedError):
                raise _DeathError(str(error.cause)) from None
            raise error.cause from None
        except (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
        ) as error:
            raise _DeathError(str(error).splitlines()[0]) from None
        except errors.RayError as error:
            raise EngineError(f"Ray: {one_line(error)}") from error

    def _replace(self, worker: _Worker, death: str) -> None:
        """Start another actor for this worker; it finds its predecessor's journal."""
        self._ray.kill(worker.actor)
        worker.starting = worker.opening = worker.working = worker.exchanging = None
        now = set(worker.claimed)
        worker.left = worker.left & now if worker.num_deaths else now
        worker.num_deaths += 1
        if worker.num_deaths > MAX_REPLACEMENTS:
            shown = ", ".join(sorted(worker.left)[:_NUM_SHOWN])
            suspects = f"; unfinished each time: {len(worker.left)} traces ({shown})"
            raise EngineError(
                f"worker {worker.name} died {worker.num_deaths} times without progress, the last "
                f"time: {death}{suspects if worker.left else ''}. Finished traces are kept; run "
                "the same command again to resume"
            )
        logger.warning(
            "worker %s died (%s); another takes its place and its %d unfinished traces",
            worker.name, death, len(now),
        )  # fmt: skip
        self._begin(worker)

    def _stop(self) -> None:
        """Let every actor finish its current write."""
        calls = [worker.actor.stop.remote() for worker in self._workers if worker.working]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_STOPPING_S)

    def _require_all_kept(self) -> None:
        """Raise an error if a journal was lost with its machine."""
        cache = open_cache(self._job.out, allow_unsealed=True)
        lost = self._reported.difference(cache.catalog.trace_ids(cache.catalog.counted))
        if lost:
            raise CacheMismatchError(
                f"{cache.path}: {len(lost)} traces were finished but are missing, e.g. "
                f"{min(lost)!r}: the journal of a worker that died was not found by its successor "
                "(--journal names a folder that all machines share). Run the same command again "
                "to capture them again."
            )


def _connected(address: str | None) -> Any:  # noqa: ANN401 (Ray is untyped here)
    """The `ray` module, connected to a cluster."""
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise EngineError(
            "Ray is not installed; in a checkout of leadspan: pip install '.[ray]'"
        ) from error
    options: dict[str, Any] = {"address": address or "local", "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"Ray cluster {address or 'here'}: {one_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the job with code 15
    return ray
