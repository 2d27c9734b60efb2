"""Time from the start of a capture that is resumed until its engine would be asked.

    python tools/bench_resume.py --model MODEL --text QUESTIONS.jsonl --prompts 1000000 --done 0.9

The prompts are the texts' questions, numbered; the traces that are done are commit records with the
right ids and hashes, whose shards are empty files of the right size, as in bench_catalog.py: a
resumed capture reads none. In place of the engine stands one that notes the time, and the first
request that it is given. `before_survey_s` is until the cache is open, `after_survey_s` until the
input is surveyed, from the table that the first start leaves. That table is made here by a renderer
that takes no tokenizer, for rendering a million prompts takes half an hour of processor time.
Capture and resumption are processes of their own, as they would be: imports count.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_catalog import TRACES_PER_SHARD, made_commit, made_info
from bench_json import write_figures

from teacher_cache.capture import generate as generating
from teacher_cache.capture import prepare, run
from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.capture.job import Job
from teacher_cache.engines import TeacherFacts
from teacher_cache.format import CacheWriter
from teacher_cache.sources import SourceTrace

PROMPTS = "prompts.jsonl"


class Asked(Exception):  # no error
    """The engine was asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with tokenizer and configuration")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--done", type=float, default=0.9, help="share of them")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(resumed(config_of(arguments.model, arguments.measure))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_prompts(arguments.text, arguments.prompts, Path(temporary))
        config = config_of(arguments.model, Path(temporary))
        fill(config, round(arguments.done * arguments.prompts))
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", temporary]
        figures = json.loads(subprocess.check_output(command).splitlines()[-1])
    print(", ".join(f"{name} {value:,.1f}" for name, value in figures.items()))
    write_figures(arguments.json, {"num_prompts": arguments.prompts, **figures})


def config_of(model: str, folder: Path) -> GenerateConfig:
    return GenerateConfig(
        prompts=folder / PROMPTS, model=model, out=str(folder / "cache"), max_new_tokens=64,
        id_field="id",
    )  # fmt: skip


def write_prompts(text: Path, number: int, folder: Path) -> None:
    questions = [json.loads(line)["question"] for line in text.read_text().splitlines()]
    with (folder / PROMPTS).open("w") as file:
        for n in range(number):
            content = f"{n}. {questions[n % len(questions)]}"
            row = {"id": f"q{n:07d}", "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(row) + "\n")


def job_of(config: GenerateConfig) -> Job:
    """The job that the command makes."""
    found: list[Job] = []
    generating.run_job, before = lambda _, job: found.append(job), generating.run_job
    try:
        generating.generate(config)
    finally:
        generating.run_job = before
    return found[0]


def fill(config: GenerateConfig, num_done: int) -> None:
    """Leave what a capture leaves that was stopped after some of its traces: survey and records."""
    job = job_of(config)
    job = replace(job, source=replace(job.source, render=rendered_quickly))
    run.take_survey(job, {})
    facts = TeacherFacts("vllm", "0", "float32", "float32", 49_152, 0)
    header = job.header(facts)
    CacheWriter(job.out, header, config=job.config).close()
    rng = random.Random(0)
    work = islice(job.work(), num_done)
    for shard, works in enumerate(iter(lambda: list(islice(work, TRACES_PER_SHARD)), [])):
        infos = [
            replace(made_info(0, rng), trace_id=request.request_id, source_hash=source.source_hash)
            for source, request in works
        ]
        commit = made_commit(f"w0-{shard:05d}", infos, header)
        file = Path(str(job.out), "shards", f"{commit.name}.arrow")
        with file.open("wb") as out:
            out.truncate(commit.size_bytes)
        file.with_suffix(".json").write_bytes(commit.to_bytes())


def rendered_quickly(row: dict[str, Any]) -> SourceTrace:
    """A row's trace in 20 microseconds: a resumed capture looks at what it finds of the first."""
    ids = (1, *row["id"].encode())
    return SourceTrace(row["id"], ids, len(ids), None, {})


def resumed(config: GenerateConfig) -> dict[str, float]:
    """Run the command as far as its engine."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    found: dict[str, float] = {}
    survey = run.take_survey

    def timed(*arguments: Any) -> Any:  # noqa: ANN401
        found["before_survey_s"] = time.perf_counter() - began_s
        done = survey(*arguments)
        found["after_survey_s"] = time.perf_counter() - began_s
        found["num_missing"] = done.num_missing
        return done

    class Engine:
        def __init__(self, job: Job, longest: int) -> None:
            found["asked_to_start_s"] = time.perf_counter() - began_s
            found["asked_to_start_cpu_s"] = time.process_time() - began_cpu_s
            self.facts = TeacherFacts("vllm", "0", "float32", "float32", 49_152, 0)
            self.job = job

        def run(self, writer: CacheWriter, *_: object) -> None:
            done = writer.finished()
            first_s = time.process_time()
            next(w for w in self.job.work() if w[1].request_id not in done)
            found["first_request_cpu_s"] = time.process_time() - first_s
            raise Asked

        def close(self) -> None:
            pass

    run.take_survey = timed
    prepare.capture = lambda job: run.capture(job, Engine)
    with suppress(Asked):
        generating.generate(config)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


if __name__ == "__main__":
    main()
