"""vLLM for a machine without access to a package registry: its wheel, lightened, in pieces.

    pip list --format=freeze > installed.txt        # there
    python tools/pack_vllm.py --vllm 0.32.0 --python 3.12 --installed installed.txt --out bundle
    python install_vllm.py --target site            # there, in a folder that holds all of `bundle`

Downloads vLLM's wheel and the dependencies that the list lacks, for the given Python and platform.
A package on the list is used as installed there, torch above all: vLLM's kernels are built
against torch's stable interface, and load into other versions than the one that vLLM asks for.
Packages installed in another version than asked for are listed at the end. Left out of the wheel,
by group (`--keep` includes one again):

    flash-attention-2  FlashAttention 2: a Hopper GPU uses 3, which stays, because without either
                       the worker of an engine cannot be imported
    moe                mixture-of-experts kernels, DeepGEMM
    mla                kernels for multi-head latent, linear and sparse attention
    fp4                four-bit kernels and Blackwell's attention
    rust               the Rust front end of the server
    headers            C++ headers for compiling kernels anew

and of the dependencies those in LEFT_OUT_PACKAGES (`--also` includes one again, or adds another).
What remains runs dense bfloat16 models. A piece holds at most --piece-mib, and install_vllm.py,
which needs nothing but Python and pip, checks every piece, joins and installs them, and imports
vLLM; on a GPU also the worker of an engine, and it fails where that does.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

TOOLS = Path(__file__).parent
MIB = 2**20

LEFT_OUT_FILES = {
    "flash-attention-2": ("vllm/vllm_flash_attn/_vllm_fa2_C.*",),
    "moe": ("vllm/_moe_C*.so", "vllm/third_party/deep_gemm/*"),
    "mla": ("vllm/_flashmla*.so", "vllm/_deepselect_C.*", "vllm/_flashkda_C.*"),
    "fp4": ("vllm/_qutlass_C.*", "vllm/third_party/fmha_sm100/*"),
    "rust": ("vllm/vllm-rs", "vllm/_rust_*.so"),
    "headers": ("vllm/third_party/*.h", "vllm/third_party/*.hpp", "vllm/third_party/*.cuh"),
}

# Not needed by a dense bfloat16 model: kernels and compilers for attention, quantisation and
# experts, media, other companies' interfaces, remote loading, tracing. vLLM 0.32 imports each
# of them only where it is used.
LEFT_OUT_PACKAGES = (
    "anthropic", "fastsafetensors", "flashinfer-cubin", "flashinfer-python", "humming-kernels",
    "instanttensor", "llvmlite", "mcp", "mistral-common", "numba", "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl", "opencv-python-headless", "opentelemetry-api",
    "opentelemetry-exporter-otlp", "opentelemetry-sdk", "opentelemetry-semantic-conventions-ai",
    "pynvvideocodec", "quack-kernels", "tilelang", "tokenspeed-mla", "torch", "torchaudio",
    "torchcodec", "torchvision",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The machine that the bundle is for."""

    python: str  # "3.12"
    machine: str  # "x86_64"
    glibc_minor: int

    @property
    def pip_options(self) -> list[str]:
        """The platforms one by one: pip takes no range."""
        names = [f"manylinux_2_{n}_{self.machine}" for n in range(self.glibc_minor, 4, -1)]
        names += [f"manylinux2014_{self.machine}", f"manylinux1_{self.machine}"]
        platforms = [f"--platform={name}" for name in (*names, f"linux_{self.machine}")]
        return ["--only-binary=:all:", f"--python-version={self.python}", *platforms]

    def wants(self, requirement: Requirement, extras: Iterable[str]) -> bool:
        """Whether its marker holds there, with one of the extras or without."""
        there = {
            "python_version": self.python, "python_full_version": f"{self.python}.0",
            "platform_machine": self.machine, "platform_system": "Linux", "sys_platform": "linux",
            "os_name": "posix", "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }  # fmt: skip
        marker = requirement.marker
        return marker is None or any(
            marker.evaluate({**there, "extra": extra}) for extra in ("", *extras)
        )


@dataclass
class Closure:
    """Requirements that were met so far, by name."""

    installed: dict[str, str]  # name -> version, "" where the list gives none
    left_out: set[str]
    wanted: dict[str, SpecifierSet] = field(default_factory=dict)
    extras: dict[str, set[str]] = field(default_factory=dict)
    wheels: dict[str, Path] = field(default_factory=dict)
    mismatches: set[str] = field(default_factory=set)  # in words
    skipped: set[str] = field(default_factory=set)

    def add(self, requirement: Requirement) -> None:
        """Note a requirement, or why it is not needed."""
        name = canonicalize_name(requirement.name)
        if name in self.installed:
            version = self.installed[name]
            if version and not requirement.specifier.contains(version, prereleases=True):
                asked = f"{name}{requirement.specifier}"
                self.mismatches.add(f"{asked} is asked for, {version} is installed")
        elif name in self.left_out:
            self.skipped.add(name)
        else:
            old = (self.wanted.get(name), self.extras.get(name, set()))
            self.wanted[name] = self.wanted.get(name, SpecifierSet()) & requirement.specifier
            self.extras[name] = self.extras.get(name, set()) | requirement.extras
            if old != (self.wanted[name], self.extras[name]):
                self.wheels.pop(name, None)  # once more: another version, or more dependencies


def download(requirements: list[str], target: Target, folder: Path) -> None:
    """Wheels of these requirements, without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    command += [str(folder), *target.pip_options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(
            f"pip cannot download {' '.join(requirements)} for Python {target.python}: "
            f"{' '.join(lines) or done.stderr.strip()}"
        )


def wheel_name(wheel: Path) -> str:
    return canonicalize_name(wheel.name.split("-")[0])


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def collect(closure: Closure, target: Target, folder: Path) -> None:
    """Download until nothing is missing."""
    while missing := sorted(set(closure.wanted) - set(closure.wheels)):
        for name in missing:
            for old in folder.glob("*.whl"):
                if wheel_name(old) == name:
                    old.unlink()
        download([f"{name}{closure.wanted[name]}" for name in missing], target, folder)
        found = {wheel_name(wheel): wheel for wheel in folder.glob("*.whl")}
        for name in missing:
            closure.wheels[name] = found[name]
        for name in missing:
            for requirement in requirements_of(found[name]):
                if target.wants(requirement, closure.extras[name]):
                    closure.add(requirement)


def lighten(wheel: Path, patterns: Iterable[str], out: Path) -> dict[str, int]:
    """Write the wheel without the files that match; its record lists the remaining ones.

    Returns:
        Compressed bytes left out, by pattern; 0 for a pattern without a match.
    """
    saved = dict.fromkeys(patterns, 0)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        (record,) = [n for n in old.namelist() if n.endswith(".dist-info/RECORD")]
        gone = set()
        for item in old.infolist():
            matching = [p for p in saved if fnmatch.fnmatchcase(item.filename, p)]
            if matching:
                saved[matching[0]] += item.compress_size
                gone.add(item.filename)
            elif item.filename != record:
                new.writestr(item, old.read(item), compress_type=zipfile.ZIP_DEFLATED)
        rows = [row for row in csv.reader(old.read(record).decode().splitlines()) if row]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(r for r in rows if r[0] not in gone)
        new.writestr(record, text.getvalue())
    return saved


def split(wheels: Iterable[Path], piece_bytes: int, out: Path) -> list[dict[str, object]]:
    """One tar of all wheels, cut into pieces in `out`; returns their names, sizes and hashes."""
    pieces = []
    with tempfile.TemporaryFile() as joined:
        with tarfile.open(fileobj=joined, mode="w") as tar:
            for wheel in wheels:
                tar.add(wheel, wheel.name)
        joined.seek(0)
        while data := joined.read(piece_bytes):
            file = out / f"vllm-{len(pieces):02d}.part"
            file.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            pieces.append({"name": file.name, "bytes": len(data), "sha256": digest})
    return pieces


def read_installed(file: Path) -> dict[str, str]:
    """Names and versions from `pip list`, `pip freeze` or bare names."""
    installed = {}
    for line in file.read_text().splitlines():
        words = line.split("#")[0].replace("==", " ").replace(" @ ", " ").split()
        if words and words[0] != "Package" and not words[0].startswith("-"):
            is_version = len(words) > 1 and words[1][0].isdigit()
            installed[canonicalize_name(words[0])] = words[1] if is_version else ""
    if not installed:
        raise SystemExit(f"{file}: expected the output of pip list or pip freeze, found no package")
    return installed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="version, e.g. 0.32.0")
    parser.add_argument("--python", default="3.12", help="of the machine it is for")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--glibc-minor", type=int, default=35, help="35 for glibc 2.35")
    parser.add_argument("--installed", type=Path, required=True, help="pip list's output there")
    parser.add_argument("--keep", nargs="+", choices=list(LEFT_OUT_FILES), default=[])
    parser.add_argument("--also", nargs="+", default=[], metavar="PACKAGE", help="e.g. zstandard")
    parser.add_argument("--piece-mib", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    target = Target(arguments.python, arguments.machine, arguments.glibc_minor)
    also = [Requirement(each) for each in arguments.also]
    closure = Closure(
        read_installed(arguments.installed),
        set(LEFT_OUT_PACKAGES) - {canonicalize_name(each.name) for each in also},
    )
    for requirement in (Requirement(f"vllm=={arguments.vllm}"), *also):
        closure.add(requirement)
    if "vllm" not in closure.wanted:
        raise SystemExit(f"{arguments.installed}: vllm is installed there already")
    arguments.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect(closure, target, folder)
        groups = [g for g in LEFT_OUT_FILES if g not in arguments.keep]
        patterns = [pattern for group in groups for pattern in LEFT_OUT_FILES[group]]
        whole = closure.wheels["vllm"]
        light = folder / "light" / whole.name
        light.parent.mkdir()
        saved = lighten(whole, patterns, light)
        closure.wheels["vllm"] = light
        wheels = sorted(closure.wheels.values(), key=lambda wheel: wheel.name)
        pieces = split(wheels, arguments.piece_mib * MIB, arguments.out)
        print(f"vLLM's wheel: {size(whole)}, without the following {size(light)}")
        for pattern, num_bytes in saved.items():
            print(f"  {num_bytes / MIB:7.1f} MiB  {pattern}")
        print(f"{len(wheels) - 1} dependencies, {len(pieces)} pieces in {arguments.out}")
    contents = {"vllm": arguments.vllm, "python": arguments.python, "pieces": pieces}
    (arguments.out / "bundle.json").write_text(json.dumps(contents, indent=1) + "\n")
    installer = (TOOLS / "pack_vllm_install.py").read_text()
    (arguments.out / "install_vllm.py").write_text(installer)
    print("left out:", ", ".join(sorted(closure.skipped)) or "no dependency")
    for mismatch in sorted(closure.mismatches):
        print(f"used as installed: {mismatch}")


def size(file: Path) -> str:
    return f"{file.stat().st_size / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
