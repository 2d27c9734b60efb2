"""Pages from templates: one file each, which fetches nothing and runs no script but ours.

Ids, fields, tokens and completions come from strangers. Templates escape every value; data for
scripts are JSON without `<`; and the page's Content-Security-Policy names the hashes of our script
and style, so that a browser runs nothing else even where escaping were forgotten.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.pages.numbers import byte_count, percent, quantity

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_FOLDER = Path(__file__).parent


def render(
    template: Path,
    *,
    title: str,
    scripts: Sequence[str] = (),
    **values: Any,  # noqa: ANN401  # whatever the template names
) -> bytes:
    """Fill a template that extends `base.html`.

    Args:
        template: Its file.
        title: Title of the page.
        scripts: Names of the scripts in this folder that it runs, in order.
        **values: Values that the template names; all are escaped.

    Raises:
        jinja2.UndefinedError: If the template names a value that is missing.
    """
    from markupsafe import Markup

    style, script = _text("style.css"), "\n".join(map(_text, scripts))
    allowed = {"style-src": _hash(style), "img-src": "data:"}
    if script:
        allowed["script-src"] = _hash(script)
    policy = "; ".join(
        ["default-src 'none'", *(f"{kind} {what}" for kind, what in allowed.items())]
    )
    # Our own files, which hold no value of anybody else.
    own = {"style": Markup(style), "script": Markup(script)}
    found = _environment(template.parent).get_template(template.name)
    return found.render(title=title, policy=policy, **own, **values).encode()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> "Markup":
    """A table that scrolls on its own on a narrow screen, for a template; all text is escaped."""
    made: Markup = _parts().table(columns, rows)
    return made


def words(text: str) -> "Markup":
    """A paragraph for a template, escaped; nothing for an empty text."""
    made: Markup = _parts().words(text)
    return made


def json_for_script(value: object) -> str:
    r"""JSON that may stand in a script element: `<` and the like are written as `\u003c`."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _parts() -> Any:  # noqa: ANN401  # the macros of a template
    return _environment(_FOLDER).get_template("parts.html").module


@cache
def _environment(folder: Path) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "bytes": byte_count, "quantity": quantity}
    return made
