import itertools

import pytest

from student_train.sweep.cell_run import evaluate_command
from student_train.sweep.cells import Cell
from student_train.sweep.config import SweepConfig
from teacher_cache.format.lead_spans import LeadSpans


def config_of(**changes):
    settings = {"cache": "c", "student": "s", "out": "o", "eval_prompts": "p", "num_seeds": 1}
    return SweepConfig(**(settings | changes))


def names(num_steps=100, **changes):
    return [cell.name for cell in config_of(**changes).cells(num_steps)]


def test_cells_come_seed_by_seed_and_each_once():
    found = names(lead_spans=(0.5, 1.0), baselines=("base", "full", "sft"), num_seeds=2)

    assert found == [
        "base", "span-0.5_seed-0", "span-1_seed-0", "sft_seed-0",
        "span-0.5_seed-1", "span-1_seed-1", "sft_seed-1",
    ]  # fmt: skip


def test_every_combination_of_the_lists_is_a_cell_with_a_name_of_its_own():
    sections = (("prompt", "cot", "answer"), ("cot",))
    found = names(
        lead_spans=(0.5,), trace_tokens_list=(64,), sections_list=sections,
        loss_on_list=("lead", "last"), baselines=(),
    )  # fmt: skip
    parts = itertools.product(("span-0.5", "tokens-64"), ("", "_last"), ("", "_cot"))

    assert sorted(found) == sorted(f"{a}{b}{c}_seed-0" for a, b, c in parts)


def test_middle_and_last_of_a_whole_trace_are_not_run_again():
    found = names(lead_spans=(0.5, 1.0), loss_on_list=("middle", "last"), baselines=())

    assert found == ["span-0.5_middle_seed-0", "span-0.5_last_seed-0"]


def test_masks_and_reasoning_are_told_apart_from_the_plain_curve():
    assert names(lead_spans=(1.0,), loss_dropout=0.5, baselines=("full",)) == [
        "span-1_mask-0.5_seed-0", "span-1_seed-0",
    ]  # fmt: skip
    assert names(lead_spans=(0.5,), lead_span_of="reasoning", baselines=()) == [
        "span-0.5_of-reasoning_seed-0"
    ]


def test_a_cell_tells_its_run_only_what_differs():
    cell = Cell.of("span", 3, {"lead_span": 0.5, "loss_on": "lead", "loss_dropout": 0.0})

    assert cell.options == {"lead_span": 0.5}
    assert cell.selection.lead_span == 0.5


def test_baselines_of_half_the_computation_take_half_the_steps(tmp_path):
    options = tmp_path / "run.toml"
    options.write_text("heldout-share = 0.2\nepochs = 2\nbatch-traces = 10\n")
    config = config_of(run_options=options, baselines=("half-traces", "half-steps"), lead_spans=())
    assert config.num_steps(1001) == 202
    by_kind = {cell.kind: cell.options for cell in config.cells(202)}

    assert by_kind["half-steps"] == {"max_steps": 101}
    assert by_kind["half-traces"]["max_steps"] == 101
    assert by_kind["half-traces"]["heldout_share"] == pytest.approx(0.6)  # 0.4 of 0.8 are left


def test_options_of_every_run_reach_its_configuration(tmp_path):
    options = tmp_path / "run.toml"
    options.write_text('lr = 1e-3\nbatch-traces = 4\nschedule = "linear"\n')
    config = config_of(run_options=options)
    run = config.train_config({"ce_weight": 1.0, "sections": ("cot",)})

    assert (run.lr, run.batch_traces, run.ce_weight, run.sections) == (1e-3, 4, 1.0, ("cot",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lead-span = 0.5\n", "run.toml: lead-span: not allowed here"),
        ("learning-rate = 1\n", "run.toml: no option 'learning-rate'"),
        ("lr = \n", "run.toml: expected a TOML file"),
    ],
)
def test_options_that_a_sweep_cannot_pass_on_are_named(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config_of(run_options=file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lead_spans": (0.5, 1.5)},
            "--lead-spans: expected a number above 0",
        ),
        ({"sections_list": (("cot", "thoughts"),)}, "got 'thoughts'"),
        ({"baselines": ("best",)}, "--baselines: expected one of base, sft, full"),
        ({"baselines": ("live",)}, "live: expected the teacher as --live-teacher"),
        ({"loss_on_list": ("first",)}, "--loss-on-list: expected one of lead, middle, last"),
        ({"loss_on_list": ()}, "--loss-on-list: expected at least one value"),
        ({"num_seeds": 0}, "--num-seeds: expected a number at least 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_the_command_names_what_differs_from_the_defaults():
    config = config_of(
        lead_spans=(0.5, 1.0), sections_list=(("cot", "answer"), ("cot",)), num_parallel=3,
        allow_seen_prompts=True,
    )  # fmt: skip

    command = config.command()
    assert command[:2] == ["train-student", "sweep"]
    command.remove("--allow-seen-prompts")
    named = dict(zip(command[2::2], command[3::2], strict=True))
    assert named == {
        "--cache": "c", "--student": "s", "--out": "o", "--eval-prompts": "p",
        "--lead-spans": "0.5,1.0", "--sections-list": "cot+answer,cot", "--num-seeds": "1",
    }  # fmt: skip


def test_a_mixture_is_a_cell_whose_name_a_folder_can_have():
    mixtures = (LeadSpans.parse("0.375:4,1:1"), LeadSpans.parse("0.25,1"))
    cells = list(config_of(lead_spans=(0.5,), mixture=mixtures, baselines=()).cells(100))

    assert [cell.name for cell in cells] == [
        "span-0.5_seed-0", "mix-0.375x4+1x1_seed-0", "mix-0.25x1+1x1_seed-0",
    ]  # fmt: skip
    assert cells[1].selection.lead_span == mixtures[0]
    assert {cell.kind for cell in cells[1:]} == {"mixture"}


@pytest.mark.parametrize(
    ("given", "expected"), [("", ["--dtype", "bfloat16"]), ('dtype = "float32"\n', [])]
)
def test_all_students_answer_in_the_dtype_that_trained_ones_are_saved_in(tmp_path, given, expected):
    (tmp_path / "run.toml").write_text('save-dtype = "bfloat16"\n')
    (tmp_path / "evaluate.toml").write_text(given + "limit = 4\n")
    config = config_of(
        out=tmp_path / "sweep",
        run_options=tmp_path / "run.toml",
        evaluate_options=tmp_path / "evaluate.toml",
    )
    trained = Cell.of("span", 0, {"lead_span": 0.5})
    for cell in (Cell("base", "base", None, None), trained):
        words = evaluate_command(config, cell)
        place = words.index("--dtype") if "--dtype" in words else len(words)
        assert words[place : place + 2] == expected
