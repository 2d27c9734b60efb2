"""A bundle of vLLM: made from made-up wheels by the real pip, and installed by its own script."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NOISE = os.urandom(5 << 19)  # 2.5 MiB that compress to as much

VLLM_FILES = {
    "vllm/__init__.py": b"__version__ = '0.99.0'\nEngineArgs = LLMEngine = SamplingParams = None\n"
    b"import needed, deeper",
    "vllm/_C_stable_libtorch.abi3.so": NOISE,
    "vllm/_moe_C_stable_libtorch.abi3.so": b"experts",
    "vllm/vllm_flash_attn/__init__.py": b"",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"attention",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"attention",
    "vllm/v1/worker/gpu_worker.py": b"from vllm.vllm_flash_attn import _vllm_fa3_C",
    "vllm/vllm-rs": b"rust",
    "vllm/third_party/deep_gemm/include/a/b.hpp": b"header",
    "vllm/third_party/flash.h": b"header",
}
LEFT_OUT = {name for name in VLLM_FILES if name not in {
    "vllm/__init__.py", "vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/__init__.py",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm/v1/worker/gpu_worker.py",
}}  # fmt: skip


def module_of(name):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_wheel(folder, name, version, files, requires=(), tag="py3-none-any"):
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {each}" for each in requires]
    info = {
        "METADATA": "\n".join(["Metadata-Version: 2.1", *metadata, "Provides-Extra: more", ""]),
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    contents = {**files, **{f"{stem}.dist-info/{k}": v.encode() for k, v in info.items()}}
    record = [f"{each},," for each in (*contents, f"{stem}.dist-info/RECORD")]
    contents[f"{stem}.dist-info/RECORD"] = "\n".join(record).encode()
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in contents.items():
            archive.writestr(file, data)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A folder that pip takes for a registry."""
    folder = tmp_path_factory.mktemp("registry")
    make_wheel(
        folder, "vllm", "0.99.0", VLLM_FILES,
        ["torch==2.98.0", "numpy<1", "Needed[more]>=2", "tilelang==0.1", "old>1",
         'not-here; sys_platform == "win32"', 'for-tests; extra == "test"'],
        tag="cp38-abi3-manylinux_2_28_x86_64",
    )  # fmt: skip
    for version in ("1.0", "2.5"):
        code = f"v = '{version}'".encode()
        make_wheel(
            folder, "needed", version, {"needed.py": code}, ['deeper; extra == "more"', "old<3"]
        )
    make_wheel(folder, "deeper", "7.0", {"deeper.py": b""}, ["needed"])
    for version in ("2.0", "3.0"):
        make_wheel(folder, "old", version, {"old.py": f"v = '{version}'".encode()})
    make_wheel(folder, "extra-one", "1.0", {"extra_one.py": b""})
    return folder


def pack(registry, out, *arguments, installed="numpy==2.0\ntorch 2.11.0\n"):
    listed = out.parent / "installed.txt"
    listed.write_text(installed)
    return subprocess.run(
        [sys.executable, "tools/pack_vllm.py", "--vllm", "0.99.0", "--python", PYTHON,
         "--installed", str(listed), "--out", str(out), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "bundle"
    done = pack(registry, out, "--also", "extra-one", "--piece-mib", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def install(bundle, target):
    return subprocess.run(
        [sys.executable, str(bundle / "install_vllm.py"), "--target", str(target)],
        capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed") / "site"
    done = install(bundle[0], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vLLM 0.99.0 imports with torch" in done.stdout
    return folder


@pytest.mark.slow
def test_a_bundle_installs_what_is_lacking_and_imports(site):
    assert {file.name for file in site.glob("*.py")} == {
        "needed.py", "deeper.py", "old.py", "extra_one.py",
    }  # fmt: skip
    # Two packages ask for old: what both can live with. Of the others the newest.
    assert (site / "old.py").read_text() == "v = '2.0'"
    assert (site / "needed.py").read_text() == "v = '2.5'"


@pytest.mark.slow
def test_what_a_dense_model_does_not_need_is_left_out_and_the_rest_is_untouched(site):
    there = {str(file.relative_to(site)) for file in (site / "vllm").rglob("*")}
    assert there & LEFT_OUT == set()
    assert (site / "vllm" / "_C_stable_libtorch.abi3.so").read_bytes() == NOISE
    record = (site / "vllm-0.99.0.dist-info" / "RECORD").read_text()
    assert not any(name in record for name in LEFT_OUT)


@pytest.mark.parametrize("is_whole", [True, False])
def test_without_what_a_worker_imports_there_is_no_success_on_a_gpu(tmp_path, capfd, is_whole):
    install_vllm = module_of("pack_vllm_install")
    files = {
        "torch.py": "__version__ = '2.98'\nclass cuda:\n    is_available = lambda: True\n"
        "class ops:\n    class _C:\n        rms_norm = None\n",
        "vllm/__init__.py": VLLM_FILES["vllm/__init__.py"].decode().replace("import needed", "#"),
        "vllm/platforms/cuda.py": "",
        "vllm/model_executor/models/qwen3.py": "",
        "vllm/v1/worker/gpu_worker.py": "from vllm.vllm_flash_attn import fa3",
        "vllm/vllm_flash_attn/__init__.py": "",
    }
    if is_whole:
        files["vllm/vllm_flash_attn/fa3.py"] = ""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if is_whole:
        install_vllm.check(tmp_path)
        assert "an engine's worker load" in capfd.readouterr().out
        return
    with pytest.raises(SystemExit, match="an engine cannot start with it"):
        install_vllm.check(tmp_path)
    assert "cannot import name 'fa3'" in capfd.readouterr().err


@pytest.mark.slow
def test_what_was_decided_is_said(bundle):
    assert "left out: tilelang" in bundle[1]
    said = [line for line in bundle[1].splitlines() if line.startswith("used as installed")]
    assert said == [
        "used as installed: numpy<1 is asked for, 2.0 is installed",
        "used as installed: torch==2.98.0 is asked for, 2.11.0 is installed",
    ]


@pytest.mark.slow
def test_pieces_are_small_and_their_hashes_right(bundle):
    pieces = json.loads((bundle[0] / "bundle.json").read_text())["pieces"]
    assert len(pieces) == 3
    for piece in pieces:
        data = (bundle[0] / piece["name"]).read_bytes()
        assert len(data) == piece["bytes"] <= 1 << 20
        assert hashlib.sha256(data).hexdigest() == piece["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["missing", "damaged", "python"])
def test_a_bundle_that_is_not_whole_or_for_another_python_is_refused(bundle, tmp_path, harm):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle[0], copy)
    piece = copy / "vllm-01.part"
    if harm == "missing":
        piece.unlink()
        message = "vllm-01.part is missing: copy all 3 pieces"
    elif harm == "damaged":
        piece.write_bytes(piece.read_bytes()[:-1] + b"!")
        message = "vllm-01.part: 1048576 bytes with another checksum than packed; copy it again"
    else:
        file = copy / "bundle.json"
        file.write_text(file.read_text().replace(f'"{PYTHON}"', '"3.2"'))
        message = f"the bundle is for Python 3.2, this is {PYTHON}"
    done = install(copy, tmp_path / "site")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_a_group_can_be_kept(registry, tmp_path):
    pack_vllm = module_of("pack_vllm")
    (whole,) = registry.glob("vllm-*.whl")
    for group, patterns in pack_vllm.LEFT_OUT_FILES.items():
        saved = pack_vllm.lighten(whole, patterns, tmp_path / f"{group}.whl")
        names = set(zipfile.ZipFile(tmp_path / f"{group}.whl").namelist())
        gone = set(VLLM_FILES) - names
        assert gone <= LEFT_OUT
        assert bool(gone) == any(saved.values())
        if group == "flash-attention-2":
            assert gone == {name for name in VLLM_FILES if "_vllm_fa2" in name}


@pytest.mark.parametrize(
    ("installed", "message"),
    [("\n", "found no package"), ("vllm==0.99.0\n", "vllm is installed there already")],
)
def test_a_list_that_cannot_be_meant_is_refused(registry, tmp_path, installed, message):
    done = pack(registry, tmp_path / "bundle", installed=installed)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_version_that_does_not_exist_is_named(registry, tmp_path):
    done = pack(registry, tmp_path / "bundle", "--also", "needed==9")
    assert done.returncode == 1
    assert "pip cannot download" in done.stderr
    assert "needed" in done.stderr
