r"""Extraction of answers from a completion, and from the gold that it is compared with.

| written                              | the answer                                               |
| ------------------------------------ | -------------------------------------------------------- |
| `<think>...</think>rest`             | found in the text after the last closing mark            |
| `<think>...` that is never closed    | none, and wrong: a user would be given nothing           |
| `\boxed{...}`                        | content of the last one whose braces close               |
| `\boxed{}` as the last one           | empty, and wrong; the text around it is not searched     |
| `... #### 18` (GSM8K)                | the text after the last `####` on its line               |
| `The answer is 18.`, `Answer: 18`    | the text after the last such phrase, to the sentence end |
| anything else                        | the whole text                                           |

Around an answer, emphasis (`**73**`), marks of mathematics (`$73$`, `\(73\)`), `\text{...}` and a
full stop at the end are stripped. `verdicts` describes the comparison.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_BOXED = "\\boxed{"
_GSM8K = "####"
_PHRASE = re.compile(r"\banswer\s*(?:is\s*:?|:|=)", re.IGNORECASE)
_AROUND = (
    ("**", "**"), ("__", "__"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"),
    ("\\[", "\\]"), ("\\text{", "}"), ("\\textbf{", "}"), ("\\mathbf{", "}"), ("\\mathrm{", "}"),
)  # fmt: skip


@dataclass(frozen=True)
class ThinkingMarks:
    """Texts around a chain of thought; an empty closing mark means that there is none."""

    opening: str
    closing: str

    def is_open(self, text: str) -> bool:
        """Whether a text ends inside a chain of thought."""
        if not self.closing or not self.opening:
            return False
        return text.rfind(self.opening) > text.rfind(self.closing)


def extract_answer(
    prompt: str, text: str, marks: ThinkingMarks, special_tokens: Sequence[str]
) -> str | None:
    """The answer of a completion; None where its chain of thought was never closed.

    Args:
        prompt: Prompt that was completed; chat templates may open the chain of thought there.
        text: Text of the completion, special tokens included.
        marks: Marks of the chain of thought.
        special_tokens: Special tokens of the tokenizer; they are not part of an answer.
    """
    if marks.is_open(prompt + text):
        return None
    answer = text.rpartition(marks.closing)[2] if marks.closing else text
    for token in special_tokens:
        answer = answer.replace(token, "")
    return final_answer(answer)


def final_answer(text: str) -> str:
    """The part of an answer, or of a gold, that is compared; see the table above."""
    content = boxed(text)
    if content is None and _GSM8K in text:
        content = text.rpartition(_GSM8K)[2].strip().partition("\n")[0]
    if content is None:
        content = _after_phrase(text) or text
    return bare(content)


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces close, None where there is none."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth, first = 1, start + len(_BOXED)
        for place in range(first, end):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[first:place].strip()
        end = start  # it never closes: the one before, in what stands before it
    return None


def bare(text: str) -> str:
    """A text without the markup that sets it off from its surroundings."""
    before = None
    while text != before:
        before = text
        text = text.strip().removesuffix(".").rstrip()
        for opening, closing in _AROUND:
            inside = text[len(opening) : len(text) - len(closing)]
            if (
                len(text) > len(opening) + len(closing)
                and text.startswith(opening)
                and text.endswith(closing)
                and closing not in inside
                and (closing != "}" or "{" not in inside)
            ):
                text = inside
    return text


def _after_phrase(text: str) -> str | None:
    """Text after the last `answer is` or `answer:`, up to the end of its sentence or line."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    rest = text[phrases[-1].end() :].lstrip()
    if rest.startswith("**") and rest.partition("\n")[0].count("**") % 2:
        rest = rest[2:].lstrip()  # the phrase itself was set off: **Answer:** 18
    return re.split(r"\n|\.\s", rest, maxsplit=1)[0] or None
