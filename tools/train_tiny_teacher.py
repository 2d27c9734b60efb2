"""Create the embedded default: a tiny reasoning teacher, a base student and prompts, from a seed.

    python tools/train_tiny_teacher.py --out tools

Everything is created here: the task (tiny_task.py), a byte-level tokenizer, and two Qwen3 models
trained from scratch. The teacher learns right traces. The base student is smaller and learns
traces that never carry units beside a number of three digits: it knows the format and how to end,
and lacks that skill.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_task import (
    MAX_PRICES,
    MIN_PRICES,
    WORDS,
    Problem,
    extract_answer,
    make_problem,
    write_trace,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED = 20260
VOCAB_SIZE = 448
"""Model vocabulary; padded beyond the tokenizer's, as that of most released models is."""
MAX_TOKENS = 240
"""Longest completion in an evaluation; the longest right one has about 130 tokens."""
NUM_TRAIN_PROMPTS = 2000
NUM_EVAL_PROMPTS = 500
NUM_POOL_TEXTS = 800
LOG_EVERY = 100
IGNORED = -100
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model of the pair: its shape, what it learns and for how long."""

    name: str
    carries: bool
    hidden_size: int
    num_layers: int
    num_steps: int
    batch_tokens: int
    learning_rate: float


TEACHER = Recipe("tiny-teacher", True, 128, 4, 2400, 2560, 3e-3)
STUDENT = Recipe("base-student", False, 96, 3, 1500, 2560, 3e-3)


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer in which the marks and some words are single tokens."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(marks + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True) for mark in marks[:3]])
    plain = [AddedToken(word, normalized=False) for word in (*marks[3:], *words)]
    core.add_tokens(plain)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5 writes a name of its own
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build a Qwen3 model with fresh weights and the generation settings that it ships with."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 3,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 32,
        num_key_value_heads=recipe.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=recipe.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    # The usual 0.02 drowns the tokens' identity in so narrow a model: copying is never learned.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def render(tokenizer: PreTrainedTokenizerFast, prompt: str, reply: str = "") -> str:
    """Apply the chat template; with a reply, up to and including its end-of-turn token."""
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text + reply + "<|im_end|>" if reply else text


def draw_texts(
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    progress: float,
    held_out: set[frozenset[int]],
    rng: random.Random,
) -> list[str]:
    """Draw a pool of training texts; sums of few prices come first, all sizes from 0.2 on."""
    largest = min(MAX_PRICES, MIN_PRICES + int(progress * 15))
    texts: list[str] = []
    while len(texts) < NUM_POOL_TEXTS:
        problem = make_problem(rng, rng.randint(MIN_PRICES, largest))
        if frozenset(problem.prices) not in held_out:
            reply = write_trace(problem, rng, carries=recipe.carries)
            texts.append(render(tokenizer, problem.prompt, reply))
    return texts


def draw_batches(
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    held_out: set[frozenset[int]],
    rng: random.Random,
) -> Iterator[torch.Tensor]:
    """Yield right-padded batches (B, T) of token ids, B * T <= batch_tokens, -100 where padded.

    A pool of texts is sorted by length before it is cut, so that little of a batch is padding.
    """
    step = 0
    while step < recipe.num_steps:
        texts = draw_texts(tokenizer, recipe, step / recipe.num_steps, held_out, rng)
        rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
        rows.sort(key=len)
        batches = []
        while rows:
            num_rows = max(1, recipe.batch_tokens // len(rows[-1]))
            batch, rows = rows[-num_rows:], rows[:-num_rows]
            batches.append(pad_sequence(batch, batch_first=True, padding_value=IGNORED))
        rng.shuffle(batches)
        yield from batches[: recipe.num_steps - step]
        step += len(batches)


def schedule(num_steps: int) -> Callable[[int], float]:
    """Linear warm-up over 2 % of the steps, then half a cosine down to zero."""
    num_warm = max(1, num_steps // 50)

    def factor(step: int) -> float:
        return min((step + 1) / num_warm, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))

    return factor


def train(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, held_out: set[frozenset[int]], seed: int
) -> Qwen3ForCausalLM:
    """Train one model from scratch with AdamW on every token of its texts, prompt included."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} {recipe.name}")
    model = build_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(recipe.num_steps))
    started = time.monotonic()
    mean_loss = 0.0
    for step, labels in enumerate(draw_batches(tokenizer, recipe, held_out, rng), 1):
        # Right padding needs no attention mask: no real token can see what comes after it.
        loss = model(input_ids=labels.clamp(min=0), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean_loss += loss.item() / LOG_EVERY
        if step % LOG_EVERY == 0:
            elapsed_s = time.monotonic() - started
            print(
                f"{recipe.name} step {step}/{recipe.num_steps} | loss {mean_loss:.4f} nats | "
                f"{elapsed_s:.0f} s",
                flush=True,
            )
            mean_loss = 0.0
    return model.eval()


@torch.inference_mode()
def complete(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    sample: bool,
) -> list[str]:
    """Generate one completion per prompt, greedily or at temperature 1, marks included."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    greedy = {} if sample else {"do_sample": False, "temperature": None, "top_p": None}
    ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, **greedy)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


def wilson_interval(num_right: int, num_all: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion."""
    z, p = 1.959964, num_right / num_all
    centre = p + z * z / (2 * num_all)
    half = z * math.sqrt(p * (1 - p) / num_all + z * z / (4 * num_all**2))
    scale = 1 + z * z / num_all
    return max(0.0, (centre - half) / scale), (centre + half) / scale


def score(problems: list[Problem], completions: list[str]) -> list[str]:
    """Return one line per number of prices, and one for all: right answers and interval."""
    verdicts = [
        (len(problem.prices), extract_answer(text) == problem.answer)
        for problem, text in zip(problems, completions, strict=True)
    ]
    groups: list[tuple[str, list[bool]]] = [
        (str(size), [right for num_prices, right in verdicts if num_prices == size])
        for size in range(MIN_PRICES, MAX_PRICES + 1)
    ]
    groups.append(("all", [right for _, right in verdicts]))
    lines = []
    for name, rights in groups:
        low, high = wilson_interval(sum(rights), len(rights))
        share = sum(rights) / len(rights)
        lines.append(
            f"| {name} | {sum(rights)}/{len(rights)} | {share:.1%} | {low:.1%} to {high:.1%} |"
        )
    return lines


def write_prompts(path: Path, problems: list[Problem]) -> None:
    """Write one JSON object per problem."""
    lines = [
        json.dumps(
            {
                "id": f"sum-{i:05d}",
                "messages": [{"role": "user", "content": problem.prompt}],
                "answer": problem.answer,
                "operands": len(problem.prices),
            }
        )
        for i, problem in enumerate(problems)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_model(
    recipe: Recipe,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    held_out: set[frozenset[int]],
    seed: int,
) -> None:
    """Train one model, save it, measure it as saved, and write its README."""
    started = time.monotonic()
    folder = out / recipe.name
    trained = train(recipe, tokenizer, held_out, seed)
    trained.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    train_s = time.monotonic() - started

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    prompts = [problem.prompt for problem in problems]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    taught = (
        "right traces"
        if recipe.carries
        else "traces that never carry units beside a number of three digits"
    )
    lines = [
        f"# {recipe.name}",
        "",
        f"Made by `tools/train_tiny_teacher.py --seed {seed}`, trained from scratch on {taught}",
        "of the task that `tools/tiny_task.py` defines. Apache-2.0, like the repository.",
        "",
        f"- Qwen3 architecture, {num_parameters:,} parameters, float32: width"
        f" {recipe.hidden_size}, {recipe.num_layers} layers, heads of 32, vocabulary {VOCAB_SIZE}",
        f"- {recipe.num_steps} steps of at most {recipe.batch_tokens} tokens, AdamW at"
        f" {recipe.learning_rate:g}; {train_s / 60:.1f} minutes on"
        f" {torch.get_num_threads()} CPU threads",
        f"- measured on the {len(problems)} prompts of `prompts/eval.jsonl`, none of them in"
        " training",
    ]
    for title, sample in (("Greedy", False), ("Sampled at temperature 1", True)):
        torch.manual_seed(seed)
        completions = complete(model, tokenizer, prompts, sample=sample)
        lines += ["", f"## {title}", "", "| prices | right | share | 95 % interval |"]
        lines += ["| --- | --- | --- | --- |", *score(problems, completions)]
    text = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def main() -> None:
    """Create the prompts and both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of everything drawn")
    parser.add_argument("--only", choices=[TEACHER.name, STUDENT.name], help="make one of the two")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    distinct: dict[frozenset[int], Problem] = {}
    while len(distinct) < NUM_EVAL_PROMPTS + NUM_TRAIN_PROMPTS:
        problem = make_problem(rng, rng.randint(MIN_PRICES, MAX_PRICES))
        distinct.setdefault(frozenset(problem.prices), problem)
    problems = list(distinct.values())
    held_out, prompts = problems[:NUM_EVAL_PROMPTS], problems[NUM_EVAL_PROMPTS:]
    write_prompts(arguments.out / "prompts" / "eval.jsonl", held_out)
    write_prompts(arguments.out / "prompts" / "train.jsonl", prompts)

    tokenizer = build_tokenizer()
    held_out_sets = {frozenset(problem.prices) for problem in held_out}
    for recipe in (TEACHER, STUDENT):
        if arguments.only in (None, recipe.name):
            make_model(recipe, arguments.out, tokenizer, held_out, held_out_sets, arguments.seed)


if __name__ == "__main__":
    main()
