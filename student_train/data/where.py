"""`--where`: an expression over a trace's own fields, read by `ast` and never executed."""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import Catalog, TraceInfo

# Known for every trace; these names take precedence over fields of the same name.
BUILT_IN = ("trace_id", "n_total", "cot_start", "answer_start", "finish_reason")
GRAMMAR = (
    "comparisons of fields with numbers, strings, True, False, None and lists of these, "
    "`in`, `and`, `or`, `not`, and field['key']"
)

_ROWS_AT_A_TIME = 1 << 16  # whose values are Python objects at a time

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

    def holds_for(self, catalog: Catalog, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n] Whether the condition holds for the traces in n rows of a catalogue.

        Raises:
            ValueError: As `holds`, for the first trace whose values cannot be compared.
        """
        found = np.zeros(len(index), np.bool_)
        for first in range(0, len(index), _ROWS_AT_A_TIME):
            rows = index[first : first + _ROWS_AT_A_TIME]
            columns = _Columns(catalog, rows)
            try:
                values = _values(self.tree, columns, list(range(len(rows))))
            except TypeError:
                values = [self.holds(info) for info in catalog.infos(rows)]  # names the trace
            found[first : first + len(rows)] = [bool(value) for value in values]
        return found


class _Columns:
    """Values of some traces by name, as the condition asks for them."""

    def __init__(self, catalog: Catalog, rows: NDArray[np.int64]) -> None:
        self._catalog = catalog
        self._rows = rows
        self._found: dict[tuple[str, bool], list[Any]] = {}

    def of(self, name: str, *, is_field: bool = False) -> list[Any]:
        """Values under a name; with `is_field` a built-in name does not hide a field."""
        key = name, is_field
        if key not in self._found:
            self._found[key] = self._read(name, is_field=is_field)
        return self._found[key]

    def _read(self, name: str, *, is_field: bool) -> list[Any]:
        if is_field and "fields" in self._catalog.field_names:  # it hides the mapping
            return [_item(value, name) for value in self.of("fields")]
        if name in BUILT_IN and not is_field:
            return self._catalog.values(name, self._rows)
        if name == "fields" and not is_field:
            return [own.get("fields", own) for own in self._catalog.fields(self._rows)]
        return self._catalog.field(name, self._rows)


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


def _values(node: ast.expr, columns: _Columns, rows: list[int]) -> list[Any]:
    """What `_value` gives for each of some rows, a column at a time."""
    match node:
        case ast.Constant(value=value):
            return [value] * len(rows)
        case ast.Name(id=name):
            column = columns.of(name)
            return [column[row] for row in rows]
        case ast.Subscript(slice=ast.Constant(value=str() as key)) if _is_key_of_fields(node):
            column = columns.of(key, is_field=True)
            return [column[row] for row in rows]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            parts = [_values(item, columns, rows) for item in items]
            return [list(row) for row in zip(*parts, strict=True)] if parts else [[]] * len(rows)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [not value for value in _values(operand, columns, rows)]
        case ast.UnaryOp(operand=operand):
            return [-value for value in _values(operand, columns, rows)]
        case ast.BoolOp(op=op, values=parts):
            return _decided(rows, (partial(_values, part, columns) for part in parts), op)
        case ast.Subscript(value=of, slice=ast.Constant(value=str() | int() as key)):
            return [_item(value, key) for value in _values(of, columns, rows)]
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            found = [
                dict(zip(rows, _values(part, columns, rows), strict=True))
                for part in (left, *comparators)
            ]
            compared = (
                partial(_compared, _COMPARISONS[type(op)], one, other)
                for op, one, other in zip(ops, found, found[1:], strict=False)
            )
            return _decided(rows, compared, ast.And())
    raise AssertionError(f"_check let {ast.dump(node)} pass")


def _compared(
    compare: Callable[[Any, Any], bool],
    left: Mapping[int, Any],
    right: Mapping[int, Any],
    rows: list[int],
) -> list[bool]:
    return [compare(left[row], right[row]) for row in rows]


def _decided(
    rows: list[int], parts: Iterable[Callable[[list[int]], list[Any]]], op: ast.boolop
) -> list[bool]:
    """Join conditions: a part is asked only of rows that the parts before it do not decide."""
    goes_on = isinstance(op, ast.And)  # with `or`, a row is decided by the first that holds
    open_rows = rows
    for part in parts:
        values = part(open_rows)
        pairs = zip(open_rows, values, strict=True)
        open_rows = [row for row, value in pairs if bool(value) == goes_on]
    undecided = set(open_rows)
    return [(row in undecided) == goes_on for row in rows]


def _item(container: Any, key: str | int) -> Any:  # noqa: ANN401  # any JSON value
    """The value under a key or at an index; None where it is missing, as for a field."""
    if isinstance(container, Mapping):
        return container.get(key)
    if isinstance(container, list) and isinstance(key, int):
        return container[key] if -len(container) <= key < len(container) else None
    return None
