"""A small student with a tokenizer trained for a text, with weights from a seed.

    python tools/retokenizing/text_student.py TEXTS.jsonl OUT [--seeds 3]

Byte-level BPE with words as GPT-4 splits them: up to three digits are one token. Writes OUT/0,
OUT/1, ...
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_retokenize import strings_in
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUM_IDS = 2048
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_IDS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=MARKS,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=MARKS[0], pad_token=MARKS[0], chat_template=TEMPLATE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    with arguments.texts.open() as lines:
        rows = [json.loads(line) for line in lines]
    tokenizer = make_tokenizer(text for row in rows for text in strings_in(row))
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=NUM_IDS, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32, initializer_range=0.1,
            max_position_embeddings=2048, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, dtype="float32",
        )  # fmt: skip
        folder = arguments.out / str(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
