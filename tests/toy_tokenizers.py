"""Small tokenizers of every supported make, trained on texts given; and texts to train them on."""

import json
import random
from functools import cache

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from teacher_cache.transform.retokenize.token_bytes import byte_of_character

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = ("gpt2", "gpt4", "qwen", "no-words", "sentencepiece", "llama2", "unigram")
PIECES = (
    "the cat", " sat", " on the mat", "12345", " 3.14", "x += f(y[0])\n", "    return", "\t\t",
    "naïve", "e\u0301", "日本語", "漢字", " ", "  \n", "\n\n", "😀", "👩\u200d👩", "'s", "don't",
    "(a)", "));\n", "ab", "ba", "aab", "Wörter", "123", "7", " 7", "—", "...", "a\u0308b", "한국",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join)


def train(texts, vocab_size, style):
    """The tokenizer.json of a BPE tokenizer."""
    if style in ("sentencepiece", "llama2"):
        return _sentencepiece(texts, vocab_size, prepends=style == "llama2")
    if style == "unigram":
        return _unigram(texts, vocab_size)
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style == "gpt2")
    if style in ("gpt4", "qwen"):
        words = GPT4 if style == "gpt4" else GPT4.replace("{1,3}", "")
        split = pre_tokenizers.Split(Regex(words), "isolated")
        byte_level = pre_tokenizers.Sequence([split, byte_level])
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(byte_of_character()),
        special_tokens=["<|end|>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _sentencepiece(texts, vocab_size, *, prepends):
    """BPE as SentencePiece has it; Llama 2's writes a space before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = spaces
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - 256, 30), show_progress=False, limit_alphabet=20,
        special_tokens=["<|end|>", "<unk>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    parts = json.loads(tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return json.dumps(parts)


def _unigram(texts, vocab_size):
    """A unigram model with bytes for what it lacks, and words that begin with a space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=max(vocab_size - 256, 60), show_progress=False, unk_token="<unk>",
        special_tokens=["<|end|>", "<unk>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    parts = json.loads(tokenizer.to_str())
    # "...." as "..." and "." or the other way round has one score, and what stands before decides:
    # no definition could tell which, so that the toys repeat nothing within a token.
    parts["model"]["vocab"] = [
        [token, score] for token, score in parts["model"]["vocab"] if not _repeats_itself(token)
    ]
    parts["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    parts["model"]["byte_fallback"] = True
    return json.dumps(parts)


def _repeats_itself(token):
    return (token + token).find(token, 1) < len(token)


@cache
def trained(seed, style):
    """A tokenizer of one of several sizes and languages, trained once in a run of the tests."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PIECES, k=12)) for _ in range(rng.randint(2, 12))]
    return train([*texts, *PIECES], rng.randint(280, 420), style)
