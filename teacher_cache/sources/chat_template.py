"""ChatTemplate: the teacher's own chat template, a function from messages to text."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from teacher_cache.engines.checks import one_line

Message = Mapping[str, Any]

# Passed to every template, besides the user's arguments.
_GIVEN_NAMES = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "strftime_now", "raise_exception",
}  # fmt: skip
_ASSISTANT_MASK_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")  # transformers' own tag


class TemplateRefusesError(ValueError):
    """The chat template rejects these messages; the error says why."""


class ChatTemplate:
    """A tokenizer's chat template with the user's arguments.

    Args:
        tokenizer: A tokenizer of transformers.
        arguments: Passed to the template (`enable_thinking`, ...). `today` is the date for
            templates that ask for one.

    Raises:
        ValueError: If the template reads no argument of that name, or `today` is not a date.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, object]) -> None:  # noqa: ANN401 (transformers is untyped here)
        self._tokenizer = tokenizer
        self.arguments = dict(arguments)
        self._clock = _clock(self.arguments.get("today"))
        self.check_arguments(self.arguments)

    @property
    def text(self) -> str | dict[str, str] | None:
        """The template, or several by name if the tokenizer has several."""
        text: str | dict[str, str] | None = self._tokenizer.chat_template
        return text

    @property
    def source(self) -> str:
        """All of the template's text; empty without a template."""
        return "\n".join(self.text.values()) if isinstance(self.text, dict) else self.text or ""

    @cached_property
    def names_read(self) -> frozenset[str]:
        """Arguments that the template reads, besides those that every template gets."""
        from jinja2 import meta, nodes
        from jinja2.defaults import DEFAULT_NAMESPACE

        own = set(self._tokenizer.special_tokens_map) | {"bos_token", "eos_token", "pad_token"}
        read = meta.find_undeclared_variables(self._tree)
        # A default that the template sets itself hides the argument there.
        for test in self._tree.find_all(nodes.Test):
            if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
                read.add(test.node.name)
        return frozenset(read - _GIVEN_NAMES - set(DEFAULT_NAMESPACE) - own)

    @cached_property
    def values_known(self) -> dict[str, tuple[object, ...]]:
        """Name -> values that show its effect: true, false, and texts it is compared with."""
        from jinja2 import nodes

        texts: dict[str, list[str]] = {name: [] for name in sorted(self.names_read)}
        for comparison in self._tree.find_all(nodes.Compare):
            compared = {node.name for node in comparison.find_all(nodes.Name)} & texts.keys()
            for name in compared:
                for node in comparison.find_all(nodes.Const):
                    one_or_more = (
                        node.value if isinstance(node.value, list | tuple) else [node.value]
                    )
                    texts[name] += [text for text in one_or_more if text and isinstance(text, str)]
        return {name: (True, False, *dict.fromkeys(found)) for name, found in texts.items()}

    @cached_property
    def _tree(self) -> Any:  # noqa: ANN401 (jinja's nodes; importing it is left to their users)
        from jinja2 import Environment, TemplateSyntaxError

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # not HTML
        try:
            return environment.parse(_ASSISTANT_MASK_TAG.sub("", self.source))
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template cannot be read: {one_line(error)}") from error

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that the tokenizer never splits, longest first."""
        return tuple(sorted(self._tokenizer.get_added_vocab(), key=lambda text: (-len(text), text)))

    def check_arguments(self, arguments: Mapping[str, object]) -> None:
        """Refuse arguments that the template does not read.

        Raises:
            ValueError: Names the first of them.
        """
        if not self.source:
            return
        for name in arguments:
            if name != "today" and name not in self.names_read:
                close = difflib.get_close_matches(name, self.names_read, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"template argument {name!r}: the teacher's chat template does not read it, "
                    f"only {', '.join(sorted(self.names_read)) or 'none at all'}{hint}"
                )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, object] | None = None,
        is_prompt: bool = True,
        clock: Callable[[str], str] | None = None,
    ) -> str:
        """Render a conversation as text.

        Args:
            messages: Messages with `role` and `content`.
            tools: Tools that the assistant may call, for templates that describe them.
            arguments: Replace the user's own.
            is_prompt: Whether to open the assistant's next turn.
            clock: Replaces the user's date.

        Raises:
            TemplateRefusesError: If there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.source:
            raise TemplateRefusesError(
                "the teacher has no chat template; give `prompt` instead of messages"
            )
        given = dict(self.arguments if arguments is None else arguments)
        given["strftime_now"] = clock or self._clock
        if tools is not None:
            given["tools"] = list(tools)
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_prompt, **given
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateRefusesError(
                f"the chat template refuses the messages: {one_line(error)}"
            ) from error
        return text


def _clock(today: object) -> Callable[[str], str]:
    """Clock for a chat template: a capture resumed tomorrow must not differ."""
    if today is None:

        def refuse(form: str) -> str:
            raise ValueError(
                f"it asks for today's date ({form}), so a capture cannot be resumed on another "
                "day; fix one with --template-arg today=YYYY-MM-DD"
            )

        return refuse
    try:
        return datetime.fromisoformat(str(today)).strftime
    except ValueError as error:
        raise ValueError(f"template argument today: expected YYYY-MM-DD, got {today!r}") from error
