"""Training runs of several gloo processes on this machine."""

import json
import socket

import train_multiprocess
from torch import multiprocessing


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(num_processes, *configs, stop_at=None, on_each_node=None):
    """Train with so many processes, once for each config; starting them is what takes time.

    The first process is asked to stop in its step `stop_at`. `on_each_node` of them are told that
    they share a node; all by default.
    """
    ports = [free_port() for _ in configs]
    arguments = (num_processes, ports, configs, stop_at, on_each_node or num_processes)
    multiprocessing.spawn(train_multiprocess.run, arguments, nprocs=num_processes)


def metrics_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
