"""GPUs of one engine replica, from the arguments that its engine is started with."""

from collections.abc import Mapping
from dataclasses import dataclass

from teacher_cache.engines import EngineError

# Engine arguments of vLLM whose product is the number of GPUs of an engine.
_FACTORS = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")


@dataclass(frozen=True)
class ReplicaGpus:
    """GPUs of each replica.

    Attributes:
        number: GPUs of one replica.
        ray_places: Whether vLLM's own workers are placed by Ray, on any node, and the process that
            drives them has no GPU.
    """

    number: int
    ray_places: bool

    def check(self, num_replicas: int, gpus_of_nodes: list[int]) -> None:
        """Refuse what the cluster cannot hold; one without any GPU is not checked.

        Args:
            num_replicas: Replicas to be placed.
            gpus_of_nodes: GPUs of each node of the cluster.

        Raises:
            EngineError: Says what is needed and what there is.
        """
        found, needed = sum(gpus_of_nodes), num_replicas * self.number
        if not found:
            return
        if found < needed:
            raise EngineError(
                f"{num_replicas} replicas of {self.number} GPUs need {needed}, the Ray cluster "
                f"has {found}: lower --num-replicas or --tensor-parallel-size"
            )
        if self.ray_places:
            return
        room = sum(gpus // self.number for gpus in gpus_of_nodes)
        if room < num_replicas:
            raise EngineError(
                f"{num_replicas} replicas of {self.number} GPUs, each on one node: the nodes of "
                f"the Ray cluster have {', '.join(map(str, gpus_of_nodes))} GPUs, room for {room}. "
                "Lower --num-replicas or --tensor-parallel-size, or let Ray spread a replica over "
                "nodes: --engine-arg distributed_executor_backend=ray"
            )


def replica_gpus(engine_args: Mapping[str, object]) -> ReplicaGpus:
    """GPUs of a replica of these engine arguments.

    Raises:
        ValueError: If a degree of parallelism is no positive number.
    """
    number = 1
    for name in _FACTORS:
        degree = engine_args.get(name, 1)
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ValueError(f"--engine-arg {name}: expected a number from 1, got {degree!r}")
        number *= degree
    return ReplicaGpus(number, engine_args.get("distributed_executor_backend") == "ray")


def parallel_args(
    tensor_parallel_size: int, engine_args: Mapping[str, object]
) -> dict[str, object]:
    """Engine arguments with the option's degree of parallelism and its processes.

    On a cluster vLLM would use Ray for its own processes too, which a replica on one node does not
    need; whoever names a backend gets it.
    """
    args = dict(engine_args)
    if tensor_parallel_size > 1:
        args["tensor_parallel_size"] = tensor_parallel_size
    if replica_gpus(args).number > 1:
        args.setdefault("distributed_executor_backend", "mp")
    return args
