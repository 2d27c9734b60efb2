"""What follows a token at a joint, against a real tokenizer that is asked about every pair."""

import random
import unicodedata
from collections import defaultdict

import numpy as np
import pytest

from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.joints import NONE, Joints

NUM_PAIRS = 40_000


def sorted_by_kind(tokens, place):
    """Ids by the category of a character at one end; pairs of rare kinds are as likely then."""
    found = defaultdict(list)
    for token, text in tokens.items():
        character = text[place]
        found[character.isascii(), unicodedata.category(character)].append(token)
    return list(found.values())


@pytest.fixture(scope="module")
def real(tekken):
    return ByteTokenizer(tekken.to_str(), "tekken")


@pytest.mark.slow
def test_every_pair_of_a_real_vocabularys_tokens_is_written_as_the_tokenizer_does(real, tekken):
    assert tekken.model.ignore_merges  # words of the vocabulary are looked up, as Llama 3's are
    joints = Joints(real, real, real.tokens.of_id)
    texts = {}
    for token, data in enumerate(real.tokens.of_id):
        text = (data or b"").decode(errors="ignore")
        if text and text.encode() == data and real.encode_all([data]) == [[token]]:
            texts[token] = text
    rng = random.Random(0)
    ends, begins = sorted_by_kind(texts, -1), sorted_by_kind(texts, 0)
    pairs = [
        (rng.choice(rng.choice(ends)), rng.choice(rng.choice(begins))) for _ in range(NUM_PAIRS)
    ]
    left, right = np.array(pairs).T
    nobody = np.full(NUM_PAIRS, NONE)
    merged, following = joints.after(left, right, nobody, right)
    written = real.encode_all([(texts[one] + texts[other]).encode() for one, other in pairs])
    wrong = [
        (texts[one], texts[other], ids)
        for (one, other), ids, instead, after in zip(
            pairs, written, merged.tolist(), following.tolist(), strict=True
        )
        if (instead, after) != ((NONE, ids[1]) if ids[0] == one else (ids[0], other))
    ]
    assert wrong == []
