"""What every test file shares: the group of tests that need vLLM."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--without-vllm", action="store_true", help="leave out the tests that need vLLM"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "vllm_teacher" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
    if config.getoption("--without-vllm"):
        left_out = [item for item in items if item.get_closest_marker("vllm")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("vllm")]


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--without-vllm"):
        number = len(terminalreporter.stats.get("deselected", []))
        terminalreporter.write_line(f"left out with --without-vllm: {number} tests")
