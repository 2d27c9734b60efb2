"""The driver and its replicas with threads in place of Ray: deaths, errors, and their bounds."""

import types
from concurrent import futures
from dataclasses import replace

import pytest
from caches import read_all
from captures import TableTeacher, names, write_prompts

from teacher_cache.capture import ray_driver
from teacher_cache.capture.generate import generate
from teacher_cache.capture.noise import PREFIX
from teacher_cache.capture.replica_gpus import parallel_args
from teacher_cache.engines import EngineDiedError, EngineError
from teacher_cache.format import open_cache


class ActorDied(Exception):
    pass


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class ThreadActor:
    """A replica whose methods run in threads, as Ray runs them in a process."""

    def __init__(self, replica):
        self.replica = replica
        self.pool = futures.ThreadPoolExecutor(4)

    def __getattr__(self, name):
        method = getattr(self.replica, name)

        def call(*args):
            try:
                return method(*args)
            except ActorDied:
                raise
            except Exception as error:
                raise TaskError(error) from error

        return types.SimpleNamespace(remote=lambda *args: self.pool.submit(call, *args))


class ThreadRay:
    """What `cluster` uses of Ray."""

    nothing = type("Nothing", (Exception,), {})
    exceptions = types.SimpleNamespace(
        RayTaskError=TaskError,
        RayActorError=ActorDied,
        WorkerCrashedError=nothing,
        OutOfMemoryError=nothing,
        NodeDiedError=nothing,
        RayError=nothing,
    )

    def __init__(self, gpus_of_nodes=()):
        self.gpus_of_nodes = gpus_of_nodes
        self.asked = None  # options of the actors

    def nodes(self):
        alive = [{"Alive": True, "Resources": {"GPU": float(n)}} for n in self.gpus_of_nodes]
        return [*alive, {"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False}]

    def remote(self, kind):
        made = types.SimpleNamespace(remote=lambda *args: ThreadActor(kind(*args)))

        def options(**asked):
            self.asked = asked
            return made

        return types.SimpleNamespace(options=options)

    def wait(self, refs, num_returns, timeout=None):
        done, rest = futures.wait(refs, timeout, futures.FIRST_COMPLETED)
        return list(done)[:num_returns], list(rest)

    def get(self, ref):
        return ref.result()

    def kill(self, actor):
        actor.replica.stop()
        actor.pool.shutdown(wait=False)

    def shutdown(self):
        pass


class FailingTeacher(TableTeacher):
    """Raises `error` at a request, every time or `times` times over all replicas."""

    def __init__(self, asked, request_id, error, times=10**6):
        super().__init__(asked)
        self.request_id, self.error = request_id, error
        self.left = [times]

    def run(self, requests):
        for request in requests:
            if request.request_id == self.request_id and self.left[0]:
                self.left[0] -= 1
                raise self.error
            self.asked.append(request)
            yield self.rows(request)


@pytest.fixture
def threads(capture_config, asked, monkeypatch):
    """A capture of 100 traces by two replicas in threads."""
    ray = ThreadRay()
    monkeypatch.setattr(ray_driver, "_connected", lambda _: ray)
    monkeypatch.setattr(ray_driver.os, "dup2", lambda *_: None)
    write_prompts(capture_config.prompts, 100)
    return ray, replace(capture_config, num_replicas=2)


def test_replicas_share_the_work_and_the_driver_seals(threads, asked):
    _, config = threads
    report = generate(config)
    assert (report.num_traces, report.sealed) == (100, True)
    assert sorted(names(asked)) == sorted(f"p{n}" for n in range(100))
    writers = {file.stem.partition("-")[0] for file in config.out.glob("shards/*.json")}
    assert writers == {"w0", "w1"}
    assert generate(config).num_traces == 0


@pytest.mark.parametrize("error", [ActorDied("gone"), EngineDiedError("the engine died")])
def test_what_a_dead_replica_left_is_done_by_the_next_and_nothing_else_again(
    threads, asked, error, caplog
):
    _, config = threads
    teacher = FailingTeacher(asked, "p40", error, times=3)
    asked.teacher = lambda _: teacher
    report = generate(config)
    assert (report.num_traces, report.sealed) == (100, True)
    assert len([one for one in asked if not one.request_id.startswith(PREFIX)]) == 100
    assert sum("another takes its place" in message for message in caplog.messages) == 3
    assert len(read_all(open_cache(str(config.out)))) == 100


@pytest.mark.slow
def test_a_request_that_kills_its_replica_every_time_ends_the_capture(threads, asked):
    _, config = threads
    asked.teacher = lambda _: FailingTeacher(asked, "p40", ActorDied("gone"))
    with pytest.raises(
        EngineError,
        match=r"died 4 times without progress.*unfinished each time: \d+ traces \(p40, ",
    ):
        generate(config)
    asked.teacher = TableTeacher
    report = generate(config)
    assert report.sealed
    assert 0 < report.num_traces < 100  # the others were kept
    assert len(read_all(open_cache(str(config.out)))) == 100


@pytest.mark.slow
def test_an_error_of_a_replica_ends_the_capture_as_it_would_alone(threads, asked):
    _, config = threads
    asked.teacher = lambda _: FailingTeacher(asked, "p40", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        generate(config)
    asked.teacher = TableTeacher
    assert generate(config).sealed


@pytest.mark.parametrize(
    ("gpus_of_nodes", "size", "engine_arg", "message"),
    [
        ([4], 4, {}, "2 replicas of 4 GPUs need 8, the Ray cluster has 4"),
        ([4], 2, {"pipeline_parallel_size": 2}, "2 replicas of 4 GPUs need 8"),
        ([8, 4, 4], 8, {}, "the nodes of the Ray cluster have 8, 4, 4 GPUs, room for 1"),
    ],
)
def test_more_gpus_than_the_cluster_has_are_refused_before_anything_starts(
    threads, asked, gpus_of_nodes, size, engine_arg, message
):
    ray, config = threads
    ray.gpus_of_nodes = gpus_of_nodes
    asked.teacher = None  # would fail when called
    with pytest.raises(EngineError, match=message):
        generate(replace(config, tensor_parallel_size=size, engine="vllm", engine_arg=engine_arg))


@pytest.mark.parametrize(
    ("gpus_of_nodes", "engine_arg", "expected"),
    [
        ([], {}, 0),
        ([8], {}, 2),
        ([8], {"pipeline_parallel_size": 2}, 4),
        ([2, 2, 2], {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}, 0),
    ],
    ids=["no-gpu", "tensors", "pipeline", "over-nodes"],
)
def test_a_replica_holds_the_gpus_of_all_its_degrees_of_parallelism(
    threads, gpus_of_nodes, engine_arg, expected
):
    ray, config = threads
    ray.gpus_of_nodes = gpus_of_nodes
    num_replicas = 1 if sum(gpus_of_nodes) == 6 else 2
    generate(
        replace(
            config, tensor_parallel_size=2, engine="vllm", engine_arg=engine_arg,
            num_replicas=num_replicas, ray_address="auto",
        )
    )  # fmt: skip
    assert ray.asked["num_gpus"] == expected


def test_processes_of_a_replica_are_its_own_unless_ray_is_named():
    assert parallel_args(1, {"max_num_seqs": 8}) == {"max_num_seqs": 8}
    assert parallel_args(2, {}) == {
        "tensor_parallel_size": 2, "distributed_executor_backend": "mp",
    }  # fmt: skip
    over_nodes = {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert parallel_args(1, over_nodes) == over_nodes


@pytest.mark.parametrize("degree", [0, True, "2", 1.5])
def test_a_degree_of_parallelism_is_a_positive_number(capture_config, degree):
    with pytest.raises(ValueError, match="pipeline_parallel_size: expected a number from 1"):
        replace(capture_config, engine="vllm", engine_arg={"pipeline_parallel_size": degree})


def test_a_name_of_a_worker_has_no_meaning_on_a_cluster(capture_config):
    with pytest.raises(ValueError, match="leave it out with --num-replicas"):
        replace(capture_config, num_replicas=2, worker="0/2")
