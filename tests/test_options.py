"""Options as configurations, files and commands have them: one truth, in four places."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import student_train.cli.group
import teacher_cache.cli.group
from student_train.run.config import TrainConfig
from teacher_cache.capture.configs import GenerateConfig
from teacher_cache.terminal.commands import BASIC_GROUP, ConfigCommand, config_command, json_option
from teacher_cache.terminal.config_file import as_words, read_config_file
from teacher_cache.terminal.option import (
    changeable_names,
    check_options,
    option,
    options_of,
    same_option,
)


@dataclass(frozen=True, kw_only=True)
class Soup:
    """An option of every kind."""

    cook: str = option("Who cooks.", is_argument=True)
    salt: float = option("Grams of salt.", default=1.5, basic=True, above=0, at_most=10)
    plates: int = option("Plates.", default=2, group="Table", at_least=1, changeable=True)
    seed: int = option("Seed.", default=0)
    style: str = option("Style.", default="clear", choices=("clear", "creamy"))
    recipe: Path | None = option("File of the recipe.", default=None, unset="from memory")
    herbs: tuple[str, ...] = option(
        "Herbs.", default=("chives",), choices=("chives", "dill", "parsley"), group="Table"
    )
    spoons: tuple[float, ...] | None = option("Spoons.", default=None, above=0)
    sizes: tuple[int, ...] = option("Sizes.", default=(), at_least=1, can_be_empty=True)
    courses: tuple[tuple[str, ...], ...] = option("Sets.", default=(("a", "b"),))
    guest: tuple[str, ...] = option("A guest.", default=(), is_repeatable=True, can_be_empty=True)
    price: float | None = option("Price.", default=None, above=0, has_unit_letters=True)
    hot: bool = option("Serve it hot.", default=False)
    stirred: bool = option("Stir it.", default=True)
    served: bool | None = option("Serve it.", default=None, unset="on Sundays")
    extra: Mapping[str, object] = option("Anything else.", default_factory=dict)

    def __post_init__(self):
        check_options(self)
        if self.hot and self.style == "creamy":
            raise ValueError("--hot: creamy soup curdles")


CHOSEN = []


@config_command("soup", Soup)
@json_option
def soup(config, as_json):
    """Cook a soup."""
    CHOSEN.append((config, as_json))


def cooked(*words):
    """The configuration that a command line gives."""
    done = CliRunner().invoke(soup, ["anna", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return CHOSEN.pop()[0]


def refused(*words):
    """What is said of a command line that is a usage error."""
    done = CliRunner().invoke(soup, list(map(str, words)))
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_a_command_without_options_gives_the_configurations_defaults():
    assert cooked() == Soup(cook="anna")


def test_every_kind_of_value_comes_from_the_command_line():
    words = [
        *("--salt", "3", "--plates", "4", "--style", "creamy", "--recipe", "r.txt"),
        *("--herbs", "dill, parsley", "--spoons", "1,2.5", "--sizes", "3,4"),
        *("--courses", "a+b,c", "--guest", "x", "--guest", "y,z", "--price", "1.5k"),
        *("--no-stirred", "--served", "--extra", "a=1", "--extra", "b-c=true", "--extra", "d=e"),
    ]
    assert cooked(*words) == Soup(
        cook="anna", salt=3.0, plates=4, style="creamy", recipe=Path("r.txt"),
        herbs=("dill", "parsley"), spoons=(1.0, 2.5), sizes=(3, 4), courses=(("a", "b"), ("c",)),
        guest=("x", "y,z"), price=1500.0, stirred=False, served=True,
        extra={"a": 1, "b_c": True, "d": "e"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"salt": 0.0}, "--salt: expected a number above 0 and at most 10, got 0.0"),
        ({"salt": math.nan}, "--salt: expected a number above 0 and at most 10, got nan"),
        ({"plates": 0}, "--plates: expected a number at least 1, got 0"),
        ({"spoons": (1.0, -1.0)}, "--spoons: expected a number above 0, got -1.0"),
        ({"spoons": (math.inf,)}, "--spoons: expected a number above 0, got inf"),
        ({"spoons": ()}, "--spoons: expected at least one value, got none"),
        ({"style": "creemy"}, "--style: expected one of clear, creamy, got 'creemy'; did you mean"),
        ({"herbs": ("dill", "mint")}, "--herbs: expected one of chives, dill, parsley, got 'mint'"),
        ({"herbs": "dill"}, "--herbs: expected a tuple, got 'dill'"),
        ({"cook": ""}, "COOK: expected a value, got an empty text"),
        ({"hot": True, "style": "creamy"}, "--hot: creamy soup curdles"),
    ],
)
def test_a_configuration_refuses_what_is_outside_choices_and_bounds(change, message):
    with pytest.raises(ValueError, match="^" + message):
        Soup(**{"cook": "anna", **change})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["anna", "--salt", "11"], "--salt: expected a number above 0 and at most 10, got 11"),
        (["anna", "--salt", "nan"], "got nan"),
        (["anna", "--salt", "much"], "'much' is not a valid float"),
        (["anna", "--plates", "1.5"], "'1.5' is not a valid integer"),
        (["anna", "--style", "thick"], "'thick' is not one of 'clear', 'creamy'"),
        (["anna", "--herbs", "mint"], "expected one of chives, dill, parsley, got 'mint'"),
        (["anna", "--sizes", "3,4.5"], "expected whole numbers with commas between them"),
        (["anna", "--price", "cheap"], "expected a number such as 32B or 1.5e9, got 'cheap'"),
        (["anna", "--price", "-3B"], "--price: expected a number above 0"),
        (["anna", "--extra", "a"], "expected name=value, got 'a'"),
        (["anna", "--hot", "--style", "creamy"], "creamy soup curdles"),
        ([], "Missing argument 'COOK'"),
    ],
)
def test_what_a_configuration_refuses_is_wrong_usage(words, message):
    assert message in refused(*words)


def test_a_file_gives_defaults_that_the_command_line_overrides(tmp_path):
    file = tmp_path / "soup.toml"
    file.write_text(
        'salt = 3\nplates = 4\nherbs = ["dill"]\nspoons = 2\ncourses = "a+b,c"\nguest = "x,y"\n'
        'price = "32B"\nrecipe = "r.txt"\nstirred = false\nhot = true\n[extra]\na-b = [1]\n'
    )
    assert cooked("--config", file, "--plates", 5, "--extra", "c=2") == Soup(
        cook="anna", salt=3.0, plates=5, herbs=("dill",), spoons=(2.0,),
        courses=(("a", "b"), ("c",)), guest=("x,y",), price=32e9, recipe=Path("r.txt"),
        stirred=False, hot=True, extra={"c": 2},
    )  # fmt: skip
    assert cooked("--config", file).extra == {"a_b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sallt = 1\n", "no option 'sallt'; did you mean 'salt'?"),
        ("json = true\n", "no option 'json'"),
        ("salt = \n", "expected a TOML file"),
        ("salt = 1\nsalt = 2\n", "expected a TOML file"),
        ("guest = 'x'\nplates = 1.5\n", "plates: expected a whole number, got 1.5"),
        ("plates = true\n", "plates: expected a whole number, got True"),
        ('salt = "1"\n', "salt: expected a number, got '1'"),
        ("salt = 11\n", "salt: expected a number above 0 and at most 10, got 11"),
        ("salt = nan\n", "got nan"),
        ("hot = 1\n", "hot: expected true or false, got 1"),
        ("style = 1\n", "style: expected text, got 1"),
        ('style = "thick"\n', "style: expected one of clear, creamy, got 'thick'"),
        ("herbs = [1]\n", "herbs: expected text, got 1"),
        ('extra = "a=1"\n', "extra: expected a table of names and values"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "soup.toml"
    file.write_text(text)
    said = refused("anna", "--config", file)
    assert "".join(str(file).split()) in "".join(said.split())
    assert message in said


def test_a_file_must_not_set_an_option_twice_or_one_that_its_reader_sets(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("max-steps = 3\nmax_steps = 2\n")
    with pytest.raises(ValueError, match=r"run\.toml: max_steps: set twice"):
        read_config_file(file, TrainConfig)
    with pytest.raises(ValueError, match=r"run\.toml: max-steps: not allowed here"):
        read_config_file(file, TrainConfig, reserved={"max_steps"})
    with pytest.raises(ValueError, match=r"no\.toml: expected a TOML file"):
        read_config_file(tmp_path / "no.toml", TrainConfig)


NAMES = st.text("abc-=. é", min_size=1, max_size=6).filter(lambda text: not text.startswith("-"))


@pytest.mark.slow
@given(
    change=st.fixed_dictionaries(
        {},
        optional={
            "salt": st.floats(0, 10, exclude_min=True),
            "plates": st.integers(1, 10**12),
            "recipe": NAMES.map(Path),
            "herbs": st.lists(st.sampled_from(("chives", "dill")), min_size=1).map(tuple),
            "spoons": st.lists(st.floats(0, 1e9, exclude_min=True), min_size=1).map(tuple),
            "sizes": st.lists(st.integers(1, 1000)).map(tuple),
            "courses": st.sampled_from([(("a",),), (("a", "b"), ("c",))]),
            "guest": st.lists(NAMES).map(tuple),
            "price": st.floats(1, 1e12),
            "hot": st.booleans(),
            "stirred": st.booleans(),
            "served": st.booleans(),
            "extra": st.dictionaries(
                st.text("abc_", min_size=1), st.integers() | st.booleans() | NAMES
            ),
        },
    )
)
def test_a_command_line_written_from_values_reads_as_these_values(change):
    assert cooked(*as_words(Soup, change)) == Soup(cook="anna", **change)


def test_help_has_basic_options_first_and_then_each_group():
    said = CliRunner().invoke(soup, ["--help"], terminal_width=100).stdout
    headings = [line[:-1] for line in said.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["Arguments", BASIC_GROUP, "Table", "Options"]
    assert "Grams of salt.  [above 0 and at most 10; default: 1.5]" in said
    assert "Herbs.  [of chives, dill, parsley; default: chives]" in said
    assert "[default: from memory]" in said
    assert said.index("--salt") < said.index("--plates") < said.index("--seed")


def test_an_option_can_be_that_of_another_configuration():
    @dataclass(frozen=True)
    class Stew:
        plates: int = same_option(Soup, "plates", default=7, help="Bowls.")
        extra: Mapping[str, object] = same_option(Soup, "extra")

        def __post_init__(self):
            check_options(self)

    assert (Stew().plates, Stew().extra) == (7, {})
    with pytest.raises(ValueError, match="--plates: expected a number at least 1"):
        Stew(plates=0)


def test_a_field_without_metadata_and_an_unknown_attribute_are_mistakes_of_ours():
    @dataclass
    class Bare:
        plates: int = 1

    with pytest.raises(TypeError, match="plates: expected a field made by option"):
        check_options(Bare())
    with pytest.raises(TypeError, match="at_leest"):
        option("Plates.", default=1, at_leest=1)


COMMANDS = [
    pytest.param(command, id=f"{program} {name}")
    for program, group in (
        ("cache-teacher", teacher_cache.cli.group.cli),
        ("train-student", student_train.cli.group.cli),
    )
    for name, command in group.commands.items()
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_made_from_a_configuration_and_says_what_each_option_does(command):
    assert isinstance(command, ConfigCommand)
    assert {field.name for field in fields(command.config)} <= {p.name for p in command.params}
    for item in options_of(command.config).values():
        assert item.metadata["option"].help.endswith(".")
    first = command.help.split("\n")[0]
    assert len(first) <= 60
    assert first == command.get_short_help_str(61)
    assert sum(option.metadata["option"].basic for option in fields(command.config)) <= 14


def headings_of(command):
    said = command.get_help(click.Context(command, info_name=command.name))
    return [line[:-1] for line in said.splitlines() if line.endswith(":") and line[0] != " "]


def test_help_of_the_large_commands_is_grouped():
    assert headings_of(student_train.cli.group.cli.commands["run"]) == [
        "Basic options", "Data", "Student", "What enters the loss", "Loss", "Optimizer",
        "Memory and speed", "LoRA", "Measuring", "Output", "Options",
    ]  # fmt: skip
    assert headings_of(teacher_cache.cli.group.cli.commands["generate"]) == [
        "Basic options", "Input", "Teacher", "What is kept", "Scale-out", "Sampling", "Options",
    ]  # fmt: skip


@pytest.mark.parametrize("group", [teacher_cache.cli.group.cli, student_train.cli.group.cli])
def test_the_list_of_commands_is_not_cut_and_says_how_to_complete(group):
    said = CliRunner().invoke(group, ["--help"]).stdout
    assert "..." not in said.split("Commands:")[1]
    assert "_COMPLETE=bash_source" in said


def test_what_may_change_when_a_run_is_resumed_stands_with_the_options():
    names = changeable_names(TrainConfig)
    assert {"out", "cache", "student", "batch_tokens", "packing", "save_every"} <= names
    assert not {"lr", "lead_span", "seed", "epochs", "batch_traces", "dtype", "top_k"} & names


def test_configurations_are_checked_when_they_are_changed():
    config = GenerateConfig(model="m", out="o", prompts=Path("p"))
    with pytest.raises(ValueError, match="--top-k: expected a number from 1 to 254, got 0"):
        replace(config, top_k=0)
