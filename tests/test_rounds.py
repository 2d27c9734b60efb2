"""Rounds: commands one after the other, resumed at any point, and what is refused before them."""

import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from student_train.cli.group import cli as train_student
from student_train.errors import StageFailedError
from student_train.rounds import stages as stages_module
from student_train.rounds.config import RoundsConfig
from student_train.rounds.rounds import check_rounds_input, run_rounds
from student_train.rounds.stages import stages
from teacher_cache.cli.group import cli as cache_teacher
from teacher_cache.format import open_cache
from teacher_cache.format.checksums import sha256_of

TOOLS = Path(__file__).parent.parent / "tools"
STUDENT, TEACHER = str(TOOLS / "base-student"), str(TOOLS / "tiny-teacher")
FILES = {
    "rollout": "max-new-tokens = 24\n",
    "score": 'engine = "transformers"\n',
    "run": 'batch-traces = 4\ndivergence = "reverse_kl"\nce-weight = 0.0\ntracker = "none"\n',
    "evaluate": "max-new-tokens = 24\nlimit = 3\n",
}


def config_of(folder, **changes):
    settings = {
        "student": STUDENT, "teacher": (TEACHER,), "prompts": folder / "prompts.jsonl",
        "prompts_per_round": 4, "num_rounds": 2, "eval_prompts": TOOLS / "prompts/eval.jsonl",
        "out": folder / "out",
    }  # fmt: skip
    rows = (TOOLS / "prompts/train.jsonl").read_text().splitlines(keepends=True)[:8]
    (folder / "prompts.jsonl").write_text("".join(rows))
    for command, text in FILES.items():
        (folder / f"{command}.toml").write_text(text)
        settings[f"{command}_options"] = folder / f"{command}.toml"
    return RoundsConfig(**settings | changes)


def in_this_process(stage, log, children, lock):
    """`run_command` without a start of Python and torch for each."""
    program = train_student if stage.command[0] == "train-student" else cache_teacher
    result = CliRunner().invoke(program, list(stage.command[1:]))
    log.write_text(f"{result.stderr}\n{result.exception}\n")
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two rounds, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "run_command", in_this_process)
        return config_of(folder), run_rounds(config_of(folder))


def test_every_stage_is_a_command_that_can_be_typed(tmp_path):
    config = config_of(tmp_path, cache="given", own_share=0.75, other_teacher=True)
    found = list(stages(config))
    names = ["evaluate", *["rollout", "score", "run", "evaluate"] * 2]
    assert [stage.name for stage in found] == names
    for stage in found:
        group = train_student if stage.command[0] == "train-student" else cache_teacher
        command = group.get_command(click.Context(group), stage.command[1])
        command.make_context(stage.command[1], list(stage.command[2:]))  # raises what it refuses
    second = [stage.command for stage in found if stage.number == 2]
    assert second[0][second[0].index("--model") + 1] == str(tmp_path / "out/round-1/run/model")
    assert second[0][second[0].index("--skip") + 1] == "4"
    assert "0.25,0.75" in second[2]


@pytest.mark.slow
def test_the_second_round_rolls_out_what_the_first_has_trained(whole):
    config, result = whole
    first, second = (open_cache(config.out / f"round-{n}/cache").header for n in (1, 2))
    assert (first.rollout["round"], second.rollout["round"]) == (1, 2)
    assert first.rollout["student"] == STUDENT
    assert second.rollout["student"] == str(config.out / "round-1/run/model")
    assert (result.student / "model.safetensors").is_file()
    rows = json.loads((config.out / "figures.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["own"]["num_traces"] == 4
        assert row["own"]["mean_tokens"] <= 24
        assert row["run"]["own_token_share"] == 1
        assert row["own"]["cache_bytes"] > 0
        assert set(row["seconds"]) == {"rollout", "score", "run", "evaluate"}
    report = result.report.read_text()
    assert f"{rows[1]['own']['kl']:.4f} ± " in report
    assert report.count("\n| ") == 2 + len(rows)


@pytest.mark.slow
def test_the_kl_of_a_report_is_that_of_the_samples(whole):
    config, _ = whole
    cache = open_cache(config.out / "round-1/cache")
    gaps = []
    for trace in cache.read_held(cache.traces):
        for t in range(len(trace)):
            if trace.k[t]:
                entries = trace.logprobs(t)
                teacher = entries.logprobs[entries.ids == trace.token_ids[t]][0]
                gaps.append(float(trace.student_logprob[t] - teacher))
    row = json.loads((config.out / "figures.json").read_text())[1]
    assert row["own"]["kl"] == pytest.approx(sum(gaps) / len(gaps))


@pytest.mark.slow
def test_rounds_that_break_off_at_any_stage_end_the_same(whole, monkeypatch):
    config, expected = whole
    # At the same place: caches hold the name of the student's folder, and it moves their order.
    weights = sha256_of(expected.student / "model.safetensors")
    shutil.rmtree(config.out)
    calls = []

    def breaking(stage, *others):
        calls.append((stage.number, stage.name))
        if calls.count(calls[-1]) == 1 and stage.name != "evaluate":
            # The worst moment: all is written, and the stage is not recorded.
            in_this_process(stage, *others)
            return 1, ""
        return in_this_process(stage, *others)

    monkeypatch.setattr(stages_module, "run_command", breaking)
    for _ in range(6):
        with pytest.raises(StageFailedError, match="run the same command again"):
            run_rounds(config)
    result = run_rounds(config)
    assert sha256_of(result.student / "model.safetensors") == weights
    calls.clear()
    assert run_rounds(config).table == result.table
    assert calls == []


def test_a_stage_that_was_killed_says_by_what(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "run_command", lambda *_: (-9, ""))
    stage = next(stages(config_of(tmp_path)))
    with (
        stages_module.Children() as children,
        pytest.raises(StageFailedError, match=r"killed by SIGKILL .*run the same command"),
    ):
        stages_module.run_stage(stage, children, None)
    assert not stage.is_finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "holds other rounds (seed: 0 before, 5 now)"),
        ({"student": TEACHER}, "holds other rounds (student: "),
        ({"prompts_per_round": 3}, "holds other rounds (prompts_per_round"),
        ({"num_rounds": 3}, "expected 12 prompts for 3 rounds, found 8"),
        (
            {"teacher": (TEACHER, STUDENT), "other_teacher": True},
            "holds other rounds (teachers: ",
        ),
    ],
)
def test_other_rounds_in_the_same_folder_are_refused(whole, changes, message):
    config, _ = whole
    with pytest.raises(ValueError) as error:  # the message is compared below
        run_rounds(config_of(config.out.parent, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ("a", "b")}, "allow it with --other-teacher"),
        ({"teacher": ("a", "b", "c")}, "one for each of 2 rounds, got 3"),
        ({"own_share": 0.5}, "it is the share of own traces"),
        ({"eval_prompts": None}, "expected --eval-prompts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("score", 'model = "t"', "score.toml: model: not allowed here"),
        ("rollout", "seed = 1", "rollout.toml: seed: not allowed here"),
        ("run", "lrr = 1", "run.toml: no option 'lrr'"),
        ("evaluate", "limit = ", "evaluate.toml: expected a TOML file"),
    ],
)
def test_files_of_options_are_checked_before_anything_runs(
    tmp_path, monkeypatch, command, text, message
):
    monkeypatch.setitem(FILES, command, text)
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path)


def test_prompts_to_roll_out_need_no_answers_and_those_of_an_evaluation_do(tmp_path):
    bare = tmp_path / "bare.jsonl"
    rows = [{"id": str(n), "prompt": f"Sum of ${n}?"} for n in range(8)]
    bare.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config_of(tmp_path, prompts=bare, eval_prompts=None, evaluate_options=None)
    assert check_rounds_input(config)
    with pytest.raises(ValueError, match=r"bare\.jsonl:1: expected an `answer`"):
        check_rounds_input(config_of(tmp_path, eval_prompts=bare))
