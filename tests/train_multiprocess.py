"""Processes of a training run on gloo; started by test_sharding and test_processes."""

import os
import signal

import torch
import torch.distributed as dist

import student_train.run.loop as loop
import student_train.run.setup as setup
from student_train.errors import InterruptedRunError


def run(rank, world_size, port, config, stop_at):
    """Train as one of several processes, and be asked to stop while a step is worked on."""
    torch.set_num_threads(1)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    place, micro_batches, num_calls = setup.place, loop.micro_batches, 0

    def checked_place(student_with_loss, *args):
        # The main process alone has read the student's weights.
        has_weights = {not weight.is_meta for weight in student_with_loss.parameters()}
        assert has_weights == {rank == 0}
        placed = place(student_with_loss, *args)
        if config.sharding == "none":
            return placed
        for name, parameter in placed.named_parameters():
            assert isinstance(parameter, dist.tensor.DTensor), name
            local, whole = parameter.to_local().numel(), parameter.numel()
            assert local < 0.7 * whole, name
        tied = placed.model.lm_head.weight is placed.model.model.embed_tokens.weight
        assert tied == config.student.endswith("-tied")
        return placed

    def counted_micro_batches(*args, **settings):
        nonlocal num_calls
        num_calls += 1
        if num_calls == stop_at and rank == 0:
            signal.raise_signal(signal.SIGTERM)
        return micro_batches(*args, **settings)

    setup.place, loop.micro_batches = checked_place, counted_micro_batches
    try:
        loop.train(config)
    except InterruptedRunError:
        assert stop_at is not None
