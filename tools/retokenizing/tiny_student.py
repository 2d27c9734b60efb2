"""The tiny task's student with a tokenizer of its own, and the base model that it starts from.

    python tools/retokenizing/tiny_student.py OUT

Numbers of two digits are single tokens here, wherever they stand: the teacher writes a price as one
token with its sign, and every other number digit by digit. The model is the base student of
train_tiny_teacher.py: the same shape, the same texts without carries, in fewer steps.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_task import MAX_PRICES, MIN_PRICES, PRICES, WORDS, make_problem
from train_tiny_teacher import (
    NUM_EVAL_PROMPTS,
    SEED,
    STUDENT,
    build_tokenizer,
    save_tokenizer,
    train,
)
from transformers import PreTrainedTokenizerFast

NUM_STEPS = 600
NUMBERS = tuple(str(number) for number in range(10, 100))


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The teacher's bytes and words, with numbers of two digits in place of prices."""
    return build_tokenizer((*(word for word in WORDS if word not in PRICES), " $", *NUMBERS))


def main() -> None:
    out = Path(sys.argv[1])
    rng = random.Random(SEED)
    held_out: set[frozenset[int]] = set()
    while len(held_out) < NUM_EVAL_PROMPTS:  # as train_tiny_teacher.py draws them
        held_out.add(frozenset(make_problem(rng, rng.randint(MIN_PRICES, MAX_PRICES)).prices))
    tokenizer = pair_tokenizer()
    model = train(replace(STUDENT, num_steps=NUM_STEPS), tokenizer, held_out, SEED)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)


if __name__ == "__main__":
    main()
