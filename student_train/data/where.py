"""`--where`: an expression over a trace's own fields, read by `ast` and never executed."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from teacher_cache.format import TraceInfo

# Known for every trace; these names take precedence over fields of the same name.
BUILT_IN = ("trace_id", "n_total", "cot_start", "answer_start", "finish_reason")
GRAMMAR = (
    "comparisons of fields with numbers, strings, True, False, None and lists of these, "
    "`in`, `and`, `or`, `not`, and field['key']"
)

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.eq,  # a user's `is "correct"` must not depend on how strings are stored
    ast.IsNot: operator.ne,
    ast.In: lambda item, values: item in values,
    ast.NotIn: lambda item, values: item not in values,
}


@dataclass(frozen=True)
class Where:
    """A condition on traces, e.g. `verdict == "correct" and n_total < 8000`.

    A missing field is None. `fields["the name"]` reaches a field whose name is not an
    identifier.
    """

    text: str
    tree: ast.expr

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Read an expression.

        Raises:
            ValueError: If it is not an expression, or holds more than the grammar allows.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            hint = "; equality is written ==" if re.search(r"[^=!<>]=[^=]", text) else ""
            raise ValueError(f"where: {text!r} is not an expression: {error}{hint}") from error
        _check(tree, text)
        return cls(text, tree)

    @property
    def names(self) -> set[str]:
        """Names of the fields that the expression uses."""
        names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        for node in ast.walk(self.tree):
            if _is_key_of_fields(node):
                names.add(node.slice.value)  # type: ignore[attr-defined]  # checked by _check
        return names - {"fields"}

    def holds(self, trace: TraceInfo) -> bool:
        """Whether the condition holds for a trace.

        Raises:
            ValueError: If values of this trace cannot be compared; it names the trace.
        """
        built_in = {name: getattr(trace, name) for name in BUILT_IN}
        values = {"fields": trace.fields, **trace.fields, **built_in}
        try:
            return bool(_value(self.tree, values))
        except TypeError as error:
            raise ValueError(
                f"where: {self.text!r} cannot be decided for trace {trace.trace_id!r} ({error}); "
                "a missing field is None: write `field is not None and ...`"
            ) from error


def _is_key_of_fields(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "fields"
    )


def _check(node: ast.expr, text: str) -> None:
    """Refuse everything that `_value` does not know."""
    children: list[ast.expr] = []
    match node:
        case ast.BoolOp(values=children) | ast.List(elts=children) | ast.Tuple(elts=children):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            children = [operand]
        case ast.Compare(left=left, comparators=comparators):
            children = [left, *comparators]
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int())):
            children = [value]
        case ast.Name() | ast.Constant(value=str() | int() | float() | None):
            pass
        case _:
            raise ValueError(
                f"where: {ast.unparse(node)!r} in {text!r} is not understood; allowed are {GRAMMAR}"
            )
    for child in children:
        _check(child, text)


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:  # noqa: ANN401  # any JSON value
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values.get(name)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, values) for item in items]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, values)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, values)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, values) for part in parts)
        case ast.Subscript(value=of, slice=ast.Constant(value=str() | int() as key)):
            return _item(_value(of, values), key)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            found = [_value(part, values) for part in (left, *comparators)]
            pairs = zip(ops, found, found[1:], strict=False)
            return all(_COMPARISONS[type(op)](one, other) for op, one, other in pairs)
    raise AssertionError(f"_check let {ast.dump(node)} pass")


def _item(container: Any, key: str | int) -> Any:  # noqa: ANN401  # any JSON value
    """The value under a key or at an index; None where it is missing, as for a field."""
    if isinstance(container, Mapping):
        return container.get(key)
    if isinstance(container, list) and isinstance(key, int):
        return container[key] if -len(container) <= key < len(container) else None
    return None
