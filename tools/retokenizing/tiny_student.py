"""The tiny task's student with a tokenizer of its own, and the base model that it starts from.

    python tools/retokenizing/tiny_student.py OUT [--steps 600] [--seed 0]

Numbers of two digits are single tokens here, wherever they stand: the teacher writes a price as one
token with its sign, and every other number digit by digit. The model is the base student of
train_tiny_teacher.py: the same shape, the same texts without carries, in fewer steps; with 0 it has
learned nothing.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_task import MAX_PRICES, MIN_PRICES, PRICES, WORDS, make_problem
from train_tiny_teacher import (
    NUM_EVAL_PROMPTS,
    SEED,
    STUDENT,
    build_model,
    build_tokenizer,
    save_tokenizer,
    train,
)
from transformers import PreTrainedTokenizerFast

NUMBERS = tuple(str(number) for number in range(10, 100))


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The teacher's bytes and words, with numbers of two digits in place of prices."""
    return build_tokenizer((*(word for word in WORDS if word not in PRICES), " $", *NUMBERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(SEED)
    held_out: set[frozenset[int]] = set()
    while len(held_out) < NUM_EVAL_PROMPTS:  # as train_tiny_teacher.py draws them
        held_out.add(frozenset(make_problem(rng, rng.randint(MIN_PRICES, MAX_PRICES)).prices))
    tokenizer = pair_tokenizer()
    torch.manual_seed(arguments.seed)
    model = build_model(STUDENT, tokenizer)
    if arguments.steps:
        recipe = replace(STUDENT, num_steps=arguments.steps)
        model = train(recipe, tokenizer, held_out, arguments.seed)
    model.save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)


if __name__ == "__main__":
    main()
