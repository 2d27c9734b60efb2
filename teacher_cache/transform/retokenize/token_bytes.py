"""The bytes that every id of a tokenizer stands for.

Two families are supported: byte-level BPE, whose vocabulary is written in an alphabet of 256
printable characters, and SentencePiece's, which writes a space as U+2581 and bytes as <0x0A>.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

SPACE_MARK = "\u2581"  # SentencePiece's space
# Begins the stand-in for a token that is no text: 0xFF is never part of UTF-8.
NOT_TEXT = 0xFF
STAND_IN_BYTES = 5
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedTokenizerError(ValueError):
    """A tokenizer whose tokens are not pieces of the text's own bytes; the message says why."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of a tokenizer's ids.

    Attributes:
        of_id: Bytes of each id; None if it is not text (special tokens) or does not exist.
        names: Name of each id in the vocabulary; empty if there is none.
        special_ids: Content of every special token -> its id.
        is_byte_level: Whether it is byte-level BPE; SentencePiece otherwise.
        is_composing: Whether it writes a letter and its accent as one character (NFC).
    """

    of_id: tuple[bytes | None, ...]
    names: tuple[str, ...]
    special_ids: dict[str, int]
    is_byte_level: bool
    is_composing: bool


def stand_in(special_id: int) -> bytes:
    """Bytes that represent a special token of the student in a text shared by both tokenizers."""
    return bytes([NOT_TEXT]) + special_id.to_bytes(4, "big")


def special_of(text: bytes) -> int | None:
    """The special token whose stand-in some bytes begin with; None if they begin with text."""
    if len(text) >= STAND_IN_BYTES and text[0] == NOT_TEXT:
        return int.from_bytes(text[1:STAND_IN_BYTES], "big")
    return None


def token_bytes(definition: str, where: str) -> TokenBytes:
    """Read a tokenizer's vocabulary.

    Args:
        definition: The content of its `tokenizer.json`.
        where: Name of the tokenizer, for errors.

    Raises:
        UnsupportedTokenizerError: If its tokens are not bytes of the text: WordPiece, a lossy
            normaliser, an alphabet without every byte.
    """
    parts: dict[str, Any] = json.loads(definition)
    model = parts["model"]
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedTokenizerError(
            f"{where}: {kind} tokens do not hold every byte of a text (white space is dropped), so "
            "no distribution can be carried over. Expected byte-level BPE, or SentencePiece with "
            "byte fallback"
        )
    check_normalizer(parts.get("normalizer"), where)
    is_byte_level = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
    entries = model["vocab"]
    if kind == "Unigram":
        entries = {token: number for number, (token, _) in enumerate(entries)}
    if not is_byte_level and not (
        model.get("byte_fallback") and all(f"<0x{byte:02X}>" in entries for byte in range(256))
    ):
        raise UnsupportedTokenizerError(
            f"{where}: its vocabulary has no tokens for single bytes (no byte fallback), so some "
            "texts become <unk>. Expected byte-level BPE, or SentencePiece with byte fallback"
        )
    size = 1 + max([*entries.values(), *(added["id"] for added in parts["added_tokens"])])
    of_id: list[bytes | None] = [None] * size
    names = [""] * size
    read = _byte_level if is_byte_level else _sentencepiece
    for token, number in entries.items():
        of_id[number], names[number] = read(token), token
    special_ids = {}
    for added in parts["added_tokens"]:
        content = names[added["id"]] = added["content"]
        if added["special"]:
            special_ids[content] = added["id"]
            of_id[added["id"]] = None
        else:
            text = content if is_byte_level else content.replace(SPACE_MARK, " ")
            of_id[added["id"]] = text.encode()
    is_composing = '"NFC"' in json.dumps(parts.get("normalizer"))
    return TokenBytes(tuple(of_id), tuple(names), special_ids, is_byte_level, is_composing)


def check_normalizer(normalizer: dict[str, Any] | None, where: str) -> None:
    """Refuse a normaliser that does not preserve the text's bytes."""
    if normalizer is None:
        return
    kind = normalizer["type"]
    if kind == "Sequence":
        for part in normalizer["normalizers"]:
            check_normalizer(part, where)
    # NFC leaves nearly all text unchanged; where it does not, the text fails the round
    # trip and its trace is left out. A prefix added to a text is not added to a response.
    elif kind not in ("NFC", "Prepend") and not _writes_spaces(normalizer):
        raise UnsupportedTokenizerError(
            f"{where}: its normaliser {kind} changes texts before they are split into tokens. "
            "Expected none, NFC, or SentencePiece's sign for a space"
        )


def _writes_spaces(normalizer: dict[str, Any]) -> bool:
    known = ("Replace", {"String": " "}, SPACE_MARK)
    return tuple(normalizer.get(key) for key in ("type", "pattern", "content")) == known


def for_continuation(definition: str) -> str:
    """A `tokenizer.json` that adds nothing before a text, for text that continues another."""
    parts: dict[str, Any] = json.loads(definition)
    normalizer = parts.get("normalizer")
    if normalizer is not None:
        listed = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        kept = [part for part in listed if part["type"] != "Prepend"]
        parts["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pre = parts.get("pre_tokenizer")
    for part in (pre or {}).get("pretokenizers", [pre] if pre else []):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return json.dumps(parts)


def _byte_level(token: str) -> bytes | None:
    alphabet = byte_of_character()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # an id that no text produces
        return None


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return token.replace(SPACE_MARK, " ").encode()


@cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE, as GPT-2 chose it: printable characters for all bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return alphabet


@cache
def character_of_byte() -> tuple[str, ...]:
    """The alphabet of byte-level BPE by byte."""
    by_byte = {byte: character for character, byte in byte_of_character().items()}
    return tuple(by_byte[byte] for byte in range(256))
