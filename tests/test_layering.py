"""The one-way rule: who may import whom, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "vllm", "transformers", "accelerate", "datasets", "ray", "triton", "click"}

FORMAT, TERMINAL = "teacher_cache.format", "teacher_cache.terminal"
PAGES = "teacher_cache.pages"  # one style and one set of parts for the pages of both stages
ENGINES, SOURCES = "teacher_cache.engines", "teacher_cache.sources"
LOSSES = {"student_train.losses", "student_train.objective"}
# What stage two may use of stage one.
SHARED = {FORMAT, TERMINAL, PAGES, "teacher_cache.sources.files"}

# First match counts. "ours" may be prefixes; "heavy" are the only large packages allowed.
RULES = [
    ("teacher_cache.format.bands", set(), set()),
    (FORMAT, {FORMAT}, set()),
    ("teacher_cache.terminal.commands", {TERMINAL, FORMAT}, {"click"}),
    ("teacher_cache.terminal.group", {TERMINAL, FORMAT}, {"click"}),
    (TERMINAL, {TERMINAL, FORMAT}, set()),
    (PAGES, {PAGES, TERMINAL, FORMAT}, set()),
    ("teacher_cache.engines.vllm.outside_triton", set(), {"torch", "triton"}),
    ("teacher_cache.engines.vllm", {ENGINES, FORMAT}, {"vllm", "torch"}),
    ("teacher_cache.engines.transformers", {ENGINES, FORMAT}, {"torch", "transformers"}),
    (ENGINES, {ENGINES, FORMAT}, set()),
    ("teacher_cache.sources.tokenizer", {SOURCES, ENGINES, FORMAT}, {"transformers"}),
    ("teacher_cache.sources.chat_template", {ENGINES, FORMAT}, set()),
    (SOURCES, {SOURCES, FORMAT}, {"datasets"}),
    ("teacher_cache.capture.ray_driver", {"teacher_cache"}, {"ray"}),
    ("teacher_cache.cli", {"teacher_cache"}, {"click"}),
    ("teacher_cache", {"teacher_cache"}, set()),
    ("student_train.objective", set(), set()),
    ("student_train.losses.triton_math", set(), {"triton"}),
    ("student_train.losses.triton_sweeps", LOSSES, {"triton"}),
    ("student_train.losses.triton_scale", set(), {"torch", "triton"}),
    ("student_train.losses.triton_rows", LOSSES, {"torch", "triton"}),
    ("student_train.losses.triton_fused", LOSSES, {"torch", "triton"}),
    ("student_train.losses", LOSSES, {"torch"}),
    ("student_train.data", {"student_train.data", FORMAT, TERMINAL}, set()),
    (
        "student_train.batch.torch_dataset",
        {"student_train", *SHARED},
        {"torch", "accelerate", "datasets"},
    ),
    (
        "student_train.evaluation.generation_vllm",
        {"student_train", *SHARED},
        {"torch", "transformers", "vllm"},
    ),
    ("student_train.cli", {"student_train", *SHARED}, {"click"}),
    ("student_train", {"student_train", *SHARED}, {"torch", "transformers", "accelerate"}),
]
# Within a package: a room must not import one that stands after it.
LOW_TO_HIGH = {
    "teacher_cache": [
        *("format", "engines", "sources", "terminal", "pages"),
        *("capture", "transform", "examine", "cli"),
    ],
    "teacher_cache.format": ["reading", "writing", "checking"],
    "teacher_cache.sources": [
        *("row", "rejects", "tables", "json_files", "files", "marks", "trace", "slices"),
        *("chat_template", "probes", "turn_layout", "tokenizer", "marks_in_tokens"),
        *(
            "marks_in_text",
            "conversations",
            "columns",
            "rollouts",
            "prompt_turns",
            "responses",
            "render",
        ),
        *("input_traces",),
    ],
    "teacher_cache.capture": [
        *("replica_gpus", "worker_loop", "job", "run", "ray_actor", "ray_driver", "configs"),
        "prepare",
        *("generate", "score", "preview"),
    ],
    "student_train": [
        *(
            "objective",
            "losses",
            "data",
            "batch",
            "model",
            "run",
            "profile",
            "view",
            "evaluation",
            "compare",
            "sweep",
            "rounds",
            "cli",
        ),
    ],
}


def modules():
    for package in ("teacher_cache", "student_train"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports_of(file):
    """Absolute names imported anywhere in a file, but for those only used by type checkers."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            if node.module in {"teacher_cache", "student_train"}:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def broken_rules(module, imported):
    _, ours, heavy = next(rule for rule in RULES if within(module, {rule[0]}))
    for name in imported:
        top = name.partition(".")[0]
        if (
            top in {"teacher_cache", "student_train"} and name != top and not within(name, ours)
        ) or (top in HEAVY and top not in heavy):
            yield name


@pytest.mark.parametrize(("module", "file"), list(modules()), ids=lambda value: str(value))
def test_a_module_imports_only_what_stands_below_it(module, file):
    assert list(broken_rules(module, imports_of(file))) == []


def test_the_rule_notices_a_wrong_import():
    assert list(broken_rules("teacher_cache.format.trace", ["torch.nn"])) == ["torch.nn"]
    assert list(broken_rules("student_train.data.stream", ["teacher_cache.capture.run"])) == [
        "teacher_cache.capture.run"
    ]
    assert list(broken_rules("student_train.losses.rows", ["student_train.batch.micro_batch"])) == [
        "student_train.batch.micro_batch"
    ]


@pytest.mark.parametrize("package", LOW_TO_HIGH)
def test_modules_of_a_stage_import_downwards(package):
    order = LOW_TO_HIGH[package]
    for position, name in enumerate(order):
        above = {f"{package}.{other}" for other in order[position + 1 :]}
        files = [file for module, file in modules() if within(module, {f"{package}.{name}"})]
        assert files
        assert [i for file in files for i in imports_of(file) if within(i, above)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import teacher_cache.format",
        "from teacher_cache.cli.group import cli; cli(['--help'], standalone_mode=False)",
        "from teacher_cache.cli.group import cli; cli(['score', '--help'], standalone_mode=False)",
        "from student_train.cli.group import cli; cli(['run', '--help'], standalone_mode=False)",
    ],
)
def test_format_and_help_load_nothing_heavy(code):
    check = (
        f"{code}\nimport sys\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr.strip().splitlines()[-1] == "[]"
