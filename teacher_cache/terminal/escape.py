"""Makes untrusted text safe to print.

Ids, fields, tokens and file names come from outside: they may hold terminal escape sequences, marks
that turn the direction of writing, line breaks, or ten thousand characters.
"""

_SHOWN_CHARACTERS = 200


def printable(text: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """One line of text without anything that a terminal would act on.

    Args:
        text: Any object; its `str` is used.
        limit: Longer texts lose their middle, and their length is shown.
    """
    whole = str(text)
    if len(whole) > limit:
        half = limit // 2
        cut = f"{_escaped(whole[:half])}...{_escaped(whole[-half:])}"
        return f"{cut} ({len(whole):,} characters)"
    return _escaped(whole)


def printable_lines(text: str, limit: int = 8000) -> str:
    """Our own text that may quote untrusted text: line breaks and tabs are kept.

    Args:
        text: Text of one message.
        limit: Longer texts lose their middle.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-(limit // 2) :]} ({len(text):,} characters)"
    return "".join(c if c in "\n\t" or c.isprintable() else _escape(c) for c in text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not valid UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
