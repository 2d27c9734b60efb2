"""What test files share: the group of tests that need vLLM, and captures by a table."""

import getpass
import importlib.util
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from captures import VOCAB_SIZE, TableTeacher, write_prompts
from small_teachers import CHAT, make_teacher

from teacher_cache.capture import prepare
from teacher_cache.capture.configs import GenerateConfig

_LOGS = pytest.StashKey()


LEFT_OUT = {"vllm": "the tests that need vLLM", "browser": "the tests of pages in a browser"}


def pytest_addoption(parser):
    for name, what in LEFT_OUT.items():
        parser.addoption(f"--without-{name}", action="store_true", help=f"leave out {what}")


def pytest_configure(config):
    """Give commands a folder for logs, which failures and kills leave, and take it away again.

    Workers of xdist get it from the process that starts them.
    """
    if hasattr(config, "workerinput"):
        return
    usual = tempfile.gettempdir()  # from now on that of this process, so pytest's own stays there
    user_name = getpass.getuser()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_{user_name}")
    config.stash[_LOGS] = tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = config.stash[_LOGS].name


def pytest_unconfigure(config):
    if _LOGS in config.stash:
        config.stash[_LOGS].cleanup()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "vllm_teacher" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
    for name in LEFT_OUT:
        if config.getoption(f"--without-{name}"):
            left_out = [item for item in items if item.get_closest_marker(name)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(name)]
    _put_long_files_first(items)


def _put_long_files_first(items):
    """Files with engines, then those with slow tests: no worker is alone with one at the end."""
    weights = Counter()
    for item in items:
        slow, engine = (item.get_closest_marker(name) for name in ("slow", "vllm"))
        weights[item.path] += 100 if engine else 1 if slow else 0
    items.sort(key=lambda item: -weights[item.path])


def pytest_terminal_summary(terminalreporter, config):
    asked = [name for name in LEFT_OUT if config.getoption(f"--without-{name}")]
    if asked:
        number = len(terminalreporter.stats.get("deselected", []))
        flags = ", ".join(f"--without-{name}" for name in asked)
        terminalreporter.write_line(f"left out with {flags}: {number} tests")


@pytest.fixture(scope="module")
def table_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_teacher(folder, CHAT)
    settings = {"model_type": "qwen3", "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """Requests that teachers got; `asked.teacher` changes how the next one behaves."""

    class Asked(list):
        teacher = TableTeacher

    requests = Asked()
    monkeypatch.setattr(prepare, "_start", lambda *_, **__: requests.teacher(requests))
    return requests


@pytest.fixture
def capture_config(table_model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    return GenerateConfig(
        model=table_model, prompts=prompts, out=tmp_path / "cache", top_k=8, max_new_tokens=20
    )


@pytest.fixture(scope="session")
def tekken(tmp_path_factory):
    """A real tokenizer: the first ranks of Mistral's, which `mistral-common` brings with vLLM."""
    # Slow to import, and few tests need it.
    from transformers.convert_slow_tokenizer import TikTokenConverter

    (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
    content = json.loads(Path(package, "data", "tekken_240911.json").read_text())
    items = content["vocab"][:32_768]  # a prefix of the ranks is a tokenizer too
    ranks = tmp_path_factory.mktemp("tekken") / "ranks"
    ranks.write_text("".join(f"{item['token_bytes']} {n}\n" for n, item in enumerate(items)))
    pattern = content["config"]["pattern"]
    return TikTokenConverter(vocab_file=str(ranks), pattern=pattern).converted()
