"""Training runs of several gloo processes on this machine."""

import json
import socket

import train_multiprocess
from torch import multiprocessing


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(num_processes, config, *, stop_at=None):
    """Train with so many processes; the first is asked to stop in its step `stop_at`."""
    multiprocessing.spawn(
        train_multiprocess.run, (num_processes, free_port(), config, stop_at), nprocs=num_processes
    )


def metrics_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
