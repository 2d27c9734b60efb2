"""Joins the pieces of a bundle of tools/pack_vllm.py, installs them, and imports vLLM.

    python install_vllm.py --target site     # then PYTHONPATH=site
    python install_vllm.py                   # into this Python

Needs nothing but Python and pip; the pieces and bundle.json lie beside it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
# `import vllm` alone loads next to nothing of it, and its kernels want the driver's library. The
# worker imports attention, which needs its libraries, 40 s into the start of an engine.
IMPORT = """
import torch, vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
found = ["vLLM", vllm.__version__, "imports with torch", torch.__version__]
if torch.cuda.is_available():
    import vllm.platforms.cuda
    torch.ops._C.rms_norm
    import vllm.v1.worker.gpu_worker, vllm.model_executor.models.qwen3
    found.append("and its kernels and an engine's worker load")
else:
    found.append("but its worker was not tried: no GPU here")
print(*found)
"""


def join(pieces: list[dict[str, Any]], joined: IO[bytes]) -> None:
    """Check each piece and append it to an open file."""
    for piece in pieces:
        file = HERE / piece["name"]
        if not file.is_file():
            sys.exit(f"{file} is missing: copy all {len(pieces)} pieces beside install_vllm.py")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != piece["sha256"]:
            sys.exit(f"{file}: {len(data)} bytes with another checksum than packed; copy it again")
        joined.write(data)
    joined.seek(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, help="folder to install into, for PYTHONPATH")
    target = parser.parse_args().target
    bundle = json.loads((HERE / "bundle.json").read_text())
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != bundle["python"]:
        sys.exit(f"the bundle is for Python {bundle['python']}, this is {here}")
    with tempfile.TemporaryFile() as joined, tempfile.TemporaryDirectory() as folder:
        join(bundle["pieces"], joined)
        with tarfile.open(fileobj=joined) as tar:
            tar.extractall(folder, filter="data")
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
        command += ["--no-compile", "--disable-pip-version-check"]
        command += ["--target", str(target)] if target is not None else []
        subprocess.run([*command, *sorted(map(str, Path(folder).glob("*.whl")))], check=True)
    check(target)


def check(target: Path | None) -> None:
    """Import what an engine imports; exit with 1 if that fails."""
    paths = [str(target.resolve())] if target is not None else []
    paths += filter(None, [os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # In a folder without a `vllm` of its own.
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, cwd=HERE, check=False)
    if done.returncode:
        sys.exit("installed, but an engine cannot start with it: see the error above")


if __name__ == "__main__":
    main()
