"""Training runs of several gloo processes on this machine."""

import json
import multiprocessing
import socket

import train_multiprocess
from torch.multiprocessing import start_processes

# A process that has imported all this forks the others: their imports would take most of a test.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["student_train.run.loop", "peft", "transformers.models.qwen3.modeling_qwen3"]
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(num_processes, *configs, stop_at=None, on_each_node=None):
    """Train with so many processes, once for each config.

    The first process is asked to stop in its step `stop_at`. `on_each_node` of them are told that
    they share a node; all by default.
    """
    ports = [free_port() for _ in configs]
    arguments = (num_processes, ports, configs, stop_at, on_each_node or num_processes)
    start_processes(
        train_multiprocess.run, arguments, nprocs=num_processes, start_method="forkserver"
    )


def metrics_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
