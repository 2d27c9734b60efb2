"""The two packages as a user imports them: names, a trace in three lines, types, the wheel."""

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fakes import make_cache, make_traces

ROOT = Path(__file__).parent.parent
PACKAGES = ("teacher_cache", "student_train")

# As the README shows it.
SNIPPET = """
from teacher_cache import open_cache
cache = open_cache("cache")
print(cache, cache["some-id"].logprobs(12))
"""


def names_for_type_checkers(package):
    """Name -> module, as the package's TYPE_CHECKING block has it."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_what_a_type_checker_takes_it_for(package):
    face = importlib.import_module(package)
    declared = names_for_type_checkers(package)
    assert face.__all__ == sorted([*declared, "__version__"]) == dir(face)
    for name, module in declared.items():
        assert getattr(face, name) is getattr(importlib.import_module(module), name)
        assert getattr(face, name).__doc__
    functions = [name for name in declared if name.islower()]
    assert [name for name in functions if f"`{name}" not in face.__doc__] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_is_not_there_is_an_attribute_error(package):
    face = importlib.import_module(package)
    assert face.__version__ == version("leadspan")
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = face.nothing


def test_importing_the_packages_loads_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import teacher_cache, student_train\n"
        "dir(teacher_cache), dir(student_train); print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ast.literal_eval(done.stdout) == ["student_train", "teacher_cache"]


def test_a_room_of_a_package_is_not_hidden_by_a_name():
    for package in PACKAGES:
        rooms = {path.name for path in (ROOT / package).iterdir() if path.is_dir()}
        assert rooms.isdisjoint(names_for_type_checkers(package))


def test_a_trace_is_seen_in_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = make_traces(3)
    make_cache(tmp_path / "cache", made)
    assert len(SNIPPET.strip().splitlines()) == 3
    exec(SNIPPET.replace("some-id", "t1"), {})
    ids, logprobs = made[1].logprobs(12)
    shown = capsys.readouterr().out
    assert shown.startswith("Cache(") and "3 traces" in shown and len(shown) < 600
    assert f"ids={ids!r}" in shown and f"logprobs={logprobs!r}" in shown


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_holds_types_guides_and_the_format(distributions):
    wheel = zipfile.ZipFile(distributions[0])
    names = set(wheel.namelist())
    guides = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in ROOT.glob(f"{package}/**/*.md")
    }
    assert {"teacher_cache/py.typed", "student_train/py.typed"} <= names
    assert "teacher_cache/format/SPEC.md" in guides <= names
    of_pages = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for kind in ("html", "css", "js")
        for path in ROOT.glob(f"{package}/**/*.{kind}")
    }
    assert "teacher_cache/pages/style.css" in of_pages <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)
    (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "Author: The leadspan authors\n" in metadata
    assert "Classifier: Typing :: Typed\n" in metadata and "Keywords: " in metadata
    # An address that does not exist could be registered by a stranger.
    assert not re.search("^(Project-URL|Home-page):", metadata, re.MULTILINE)


@pytest.mark.slow
def test_the_source_distribution_is_small_and_builds_the_same_wheel(distributions, tmp_path):
    wheel, source = distributions
    assert source.stat().st_size < 1_500_000
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=folder, check=True)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


CONSUMER = """
from pathlib import Path

import teacher_cache
from student_train import (
    DistillationDataset, Evaluation, EvaluateConfig, Objective, SweepConfig, TokenSelection,
    TrainConfig, TrainResult, evaluate, open_data, sparse_kl, train,
)
from teacher_cache import Cache, CacheError, GenerateConfig, Trace, generate, open_cache

def likeliest(path: str, trace_id: str, t: int) -> int | None:
    cache: Cache = open_cache(path)
    try:
        trace: Trace = cache[trace_id]
    except CacheError:
        return None
    reveal_type(trace.logprobs(t).logprobs)
    return int(trace[: t + 1].logprobs(t).ids[0])

def lengths(cache: Cache) -> dict[str, int]:
    return {trace.trace_id: len(trace) for trace in cache}

def run(config: TrainConfig) -> tuple[TrainResult, Evaluation]:
    dataset = DistillationDataset(open_data(["cache"]), TokenSelection(0.5), batch_traces=4)
    reveal_type(len(dataset))
    objective = Objective("jsd", ce_weight=0.0)
    reveal_type(objective.mix)
    return train(config), evaluate(EvaluateConfig(model="run/model", prompts=Path("p.jsonl")))

reveal_type(teacher_cache.__version__)
reveal_type(sparse_kl)
generate(GenerateConfig(model="m", out="cache", prompts=Path("p.jsonl")))
"""
MISTAKES = """
from student_train import Objective
from teacher_cache import open_cache
Objective(weight=1.0)
open_cache("cache")[0]
"""


@pytest.mark.slow
def test_a_consumer_of_the_wheel_is_checked_by_strict_mypy(distributions, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(distributions[0]).extractall(site)
    ours = Path(pytest.__file__).parent.parent  # for numpy, torch and the like
    (site / "others.pth").write_text(f"{ours}\n")

    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-transformers.*]\nfollow_imports = skip\n"
    )  # minutes
    command = [
        *(sys.executable, "-m", "mypy", "--strict", "--no-incremental"),
        *("--python-executable", str(environment / "bin" / "python")),
        *("consumer.py", "mistakes.py"),
    ]
    bare = {"PATH": "/usr/bin:/bin"}  # without MYPYPATH and PYTHONPATH
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=bare)
    found = done.stdout
    assert re.findall(r"^(.*?):.* error: (.*)  \[", found, re.MULTILINE) == [
        (
            "mistakes.py",
            'Unexpected keyword argument "weight" for "Objective"; did you mean "ce_weight"?',
        ),
        ("mistakes.py", 'Invalid index type "int" for "Cache"; expected type "str"'),
    ], found + done.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', found)
    assert len(revealed) == 5 and "Any" not in revealed
    assert "Objective" in revealed[-1]
