"""Tokenizers of every supported make as functions of bytes, and those that are refused."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import STYLES, TEXTS, trained

from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.token_bytes import UnsupportedTokenizerError

WORDS = st.lists(st.sampled_from(["Ab", " a", "  ", "1 ", "23", "é ", "\n", "'s", " (", "x"]))


@cache
def tokenizer(style):
    return ByteTokenizer(trained(3, style), style)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=30, deadline=None)
@given(st.tuples(TEXTS, WORDS.map("".join)).map("".join))
def test_texts_are_encoded_word_by_word_as_they_are_whole(style, text):
    encode, tokens = tokenizer(style), tokenizer(style).tokens
    ids = encode.encode(text)
    assert ids == encode.encode_all([text.encode()])[0]
    written = b"".join(tokens.of_id[token] or b"" for token in ids)
    if style != "qwen":  # which composes accents
        assert written.decode() == text  # no space is added before it, whatever the tokenizer's way


def test_a_vocabulary_that_reaches_across_words_is_asked_for_whole_texts():
    parts = json.loads(trained(3, "gpt2"))
    words = ByteTokenizer(json.dumps(parts), "T")
    merged = {"id": len(parts["model"]["vocab"]), "content": "cat sat", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    parts["added_tokens"].append({**merged, **flags})
    phrases = ByteTokenizer(json.dumps(parts), "T")
    assert merged["id"] in phrases.encode("the cat sat on")
    assert merged["id"] not in words.encode("the cat sat on")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFKC"},
        {"type": "Lowercase"},
        {"type": "StripAccents"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
    ],
)
def test_normalisers_that_lose_bytes_are_refused_by_name(normalizer):
    parts = json.loads(trained(3, "gpt2")) | {"normalizer": normalizer}
    named = normalizer.get("normalizers", [normalizer])[-1]["type"]
    with pytest.raises(UnsupportedTokenizerError, match=f"its normaliser {named} changes texts"):
        ByteTokenizer(json.dumps(parts), "student 's'")


def test_a_vocabulary_without_single_bytes_is_refused():
    parts = json.loads(trained(3, "unigram"))
    parts["model"]["byte_fallback"] = False
    with pytest.raises(UnsupportedTokenizerError, match="no tokens for single bytes"):
        ByteTokenizer(json.dumps(parts), "student 's'")
