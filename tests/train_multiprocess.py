"""Processes of a training run on gloo; started by test_sharding and test_processes."""

import os
import signal

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

import student_train.run.loop as loop
import student_train.run.setup as setup
from student_train.errors import InterruptedRunError


def run(rank, world_size, ports, configs, stop_at, on_each_node):
    """Train as one of several processes, once for each config.

    The first is asked to stop while it works on its step `stop_at`.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
        "RANK": str(rank), "LOCAL_RANK": str(rank % on_each_node), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(on_each_node), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    place, global_counts, num_calls = setup.place, loop.global_counts, 0

    def checked_place(student, accelerator, sharding, **settings):
        # The main process alone has read the student's weights.
        has_weights = {not weight.is_meta for weight in student.parameters()}
        assert has_weights == {rank == 0}
        placed = place(student, accelerator, sharding, **settings)
        if sharding == "none":
            return placed
        for name, parameter in placed.named_parameters():
            assert isinstance(parameter, dist.tensor.DTensor), name
            local, whole = parameter.to_local().numel(), parameter.numel()
            assert local < 0.7 * whole, name
        tied = placed.model.lm_head.weight is placed.model.model.embed_tokens.weight
        assert tied == configs[0].student.endswith("-tied")
        return placed

    def counted(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == stop_at and rank == 0:
            signal.raise_signal(signal.SIGTERM)
        return global_counts(*args)

    def captured(module, **settings):
        """Capture graphs as torch.compile does; to make code of them takes a minute each."""
        compile_module(module, backend="aot_eager", **settings)

    setup.place, loop.global_counts = checked_place, counted
    compile_module, torch.nn.Module.compile = torch.nn.Module.compile, captured
    try:
        for config, port in zip(configs, ports, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            loop.train(config)
            AcceleratorState._reset_state(reset_partial_state=True)
    except InterruptedRunError:
        assert stop_at is not None
