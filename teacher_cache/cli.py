"""cache-teacher: options and messages, nothing else."""

import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from teacher_cache import inspection, messages
from teacher_cache.capture import CaptureReport
from teacher_cache.engines import EngineError
from teacher_cache.format import CacheError, CacheHeader, open_cache, seal_cache
from teacher_cache.modes import ENGINES, GenerateConfig, ScoreConfig, generate, score

if TYPE_CHECKING:
    from teacher_cache.tokenizer import TeacherTokenizer

_Command = TypeVar("_Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path)


class NamedValue(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """`name=value`, the value JSON where it reads as such and text otherwise."""

    name = "name=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        """Split at the first equals sign."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"expected name=value, got {value!r}", param, ctx)
        try:
            return name.strip().replace("-", "_"), json.loads(text)
        except ValueError:
            return name.strip().replace("-", "_"), text


def _named(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, object], ...]
) -> dict[str, object]:
    del ctx, param
    return dict(pairs)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Values of a TOML file become the defaults of the command's options."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {option.name for option in ctx.command.params}
    if unknown := sorted(set(values) - known):
        raise click.BadParameter(f"{path}: no option {unknown[0]!r}", ctx, param)
    for name in ("engine_arg", "template_arg"):
        if isinstance(values.get(name), Mapping):
            values[name] = list(values[name].items())
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _capture_options(command: _Command) -> _Command:
    """The options that both ways of capturing have; their fields are in CaptureConfig."""
    default = GenerateConfig
    options = [
        click.option("--model", required=True, help="Teacher: a folder or a Hugging Face id."),
        click.option("--out", required=True, type=FOLDER, help="Folder of the cache."),
        click.option(
            "--engine", type=click.Choice(ENGINES), default=default.engine, show_default=True
        ),
        click.option(
            "--top-k",
            type=int,
            default=default.top_k,
            show_default=True,
            help="Entries kept per token, at most.",
        ),
        click.option(
            "--mass",
            type=float,
            default=default.mass,
            show_default=True,
            help="Keep the fewest entries with this mass.",
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option("--dtype", default=default.dtype, show_default=True),
        click.option("--max-model-len", type=click.IntRange(2), help="Tokens per trace, at most."),
        click.option(
            "--engine-arg",
            type=NamedValue(),
            multiple=True,
            callback=_named,
            help="An engine argument of vLLM, e.g. tensor_parallel_size=2. Repeatable.",
        ),
        click.option(
            "--template-arg",
            type=NamedValue(),
            multiple=True,
            callback=_named,
            help="An argument of the chat template, e.g. enable_thinking=true. Repeatable.",
        ),
        click.option("--think-open", default=default.think_open, show_default=True),
        click.option("--think-close", default=default.think_close, show_default=True),
        click.option(
            "--num-bands",
            type=click.IntRange(1, 255),
            default=default.num_bands,
            show_default=True,
            help="Slices per trace: lead spans are read in steps of 1/N.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(1),
            help="Capture only so many traces, and estimate the whole.",
        ),
        click.option(
            "--skip-bad-lines",
            is_flag=True,
            help="Leave out lines that cannot be used, and count them.",
        ),
        click.option(
            "--worker",
            default=default.worker,
            show_default=True,
            help="Name of this process among several that write one cache.",
        ),
        click.option(
            "--config",
            type=FILE,
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="TOML file with defaults for these options.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leadspan")
def cli() -> None:
    """Run a teacher once and keep its top-k logits as a cache of Arrow shards."""


@cli.command("generate")
@click.option("--prompts", required=True, type=FILE, help="JSONL with `prompt` or `messages`.")
@_capture_options
@click.option("--temperature", type=click.FloatRange(0), help="Default: the model's own.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Default: the model's.")
@click.option("--sample-top-k", type=click.IntRange(0), help="The sampler's cut-off; 0 for none.")
@click.option("--max-tokens", type=click.IntRange(1), help="New tokens per trace, at most.")
@click.option("--seed", type=int, default=GenerateConfig.seed, show_default=True)
@click.option(
    "--samples-per-prompt",
    type=click.IntRange(1),
    default=GenerateConfig.samples_per_prompt,
    show_default=True,
)
@click.option(
    "--capture-prompt/--no-capture-prompt",
    default=GenerateConfig.capture_prompt,
    show_default=True,
    help="Keep distributions over the prompt's tokens too.",
)
def generate_command(**options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Let the teacher answer prompts; a run that was stopped goes on where it stood.

    \b
    cache-teacher generate --model Qwen/Qwen3-32B --prompts prompts.jsonl --out cache
    """
    _say_report(generate(GenerateConfig(**options)), options["out"])


@cli.command("score")
@click.option(
    "--traces",
    required=True,
    type=FILE,
    help="JSONL with `messages`, `prompt` and `response`, or `token_ids`.",
)
@_capture_options
@click.option(
    "--capture-prompt/--no-capture-prompt",
    default=ScoreConfig.capture_prompt,
    show_default=True,
    help="Keep distributions over the prompt's tokens too.",
)
def score_command(**options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Keep the teacher's distributions over traces that exist already.

    \b
    cache-teacher score --model Qwen/Qwen3-32B --traces traces.jsonl --out cache
    """
    _say_report(score(ScoreConfig(**options)), options["out"])


@cli.command("seal")
@click.argument("cache", type=FOLDER)
def seal_command(cache: Path) -> None:
    """Declare a cache complete as it is, after a trial run or when workers ran apart.

    \b
    cache-teacher seal cache
    """
    seal = seal_cache(cache).seal
    if seal is not None:
        click.echo(f"{cache}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens")


@cli.command("inspect")
@click.argument("cache")
@click.option("--trace", "trace_id", help="Show this trace; the first one otherwise.")
@click.option("--model", help="Where the teacher's tokenizer is now, to show text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, without the text.")
def inspect_command(cache: str, trace_id: str | None, model: str | None, as_json: bool) -> None:
    """Show what is inside a cache: provenance, counts, sizes, and one trace as text.

    \b
    cache-teacher inspect cache --trace gsm8k-17
    """
    opened = open_cache(cache, allow_unsealed=True)
    traces = inspection.read_first_shard(opened)
    figures = inspection.inspect_cache(opened, traces)
    if as_json:
        click.echo(json.dumps(inspection.to_json(figures, opened.header)))
        return
    for line in messages.figures_lines(figures, opened.header.to_json(), cache):
        click.echo(line)
    if not traces:
        return
    trace = traces[0] if trace_id is None else inspection.find_trace(opened, trace_id)
    tokenizer = _tokenizer_to_show(opened.header, model)
    click.echo(f"\ntrace {trace.trace_id} ({trace.finish_reason}) {json.dumps(dict(trace.fields))}")
    for token in inspection.show_tokens(trace, tokenizer):
        click.echo(messages.token_line(token))


@cli.command("export")
@click.argument("cache")
@click.argument("out", type=FILE)
@click.option("--text", is_flag=True, help="Add each trace's text (JSONL only).")
@click.option("--model", help="Where the teacher's tokenizer is now, for --text.")
@click.option("--allow-unsealed", is_flag=True, help="Export what is committed so far.")
@click.option("--parquet", is_flag=True, help="One row per token with its logprobs, as Parquet.")
def export_command(
    cache: str, out: Path, text: bool, model: str | None, allow_unsealed: bool, parquet: bool
) -> None:
    """Write the traces as JSONL with their token ids, as `score` reads them, or as Parquet.

    \b
    cache-teacher export cache traces.jsonl
    cache-teacher export cache tokens.parquet --parquet
    """
    from teacher_cache.export import export_parquet, export_traces
    from teacher_cache.tokenizer import load_tokenizer

    if parquet and text:
        raise click.UsageError("--text adds text to JSONL; leave it out with --parquet")
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    if parquet:
        click.echo(f"{out}: {export_parquet(opened, out):,} traces")
        return
    tokenizer = load_tokenizer(opened.header, model) if text else None
    click.echo(f"{out}: {export_traces(opened, out, tokenizer):,} traces")


@cli.command("truncate")
@click.argument("source")
@click.argument("out", type=FOLDER)
@click.option(
    "--lead-span",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Keep this first part of every trace.",
)
@click.option("--top-k", type=click.IntRange(1), help="Keep at most so many entries per token.")
def truncate_command(source: str, out: Path, lead_span: float, top_k: int | None) -> None:
    """Write a smaller cache: the first part of every trace, or fewer entries per token.

    \b
    cache-teacher truncate cache half --lead-span 0.5 --top-k 16
    """
    from teacher_cache.truncate import truncate_cache

    seal = truncate_cache(open_cache(source), out, lead_span=lead_span, top_k=top_k).seal
    if seal is not None:
        click.echo(f"{out}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens")


def _tokenizer_to_show(header: CacheHeader, model: str | None) -> "TeacherTokenizer | None":
    """The teacher's tokenizer; without one, ids are shown instead of text."""
    from teacher_cache.tokenizer import load_tokenizer

    try:
        return load_tokenizer(header, model)
    except (EngineError, CacheError, ModuleNotFoundError) as error:
        if model is not None:
            raise
        click.echo(f"token ids instead of text ({error}); --model says where the teacher is")
        return None


def _say_report(report: CaptureReport, out: Path) -> None:
    if report.stopped_by:
        click.echo(messages.stopped_line(report, out), err=True)
        sys.exit(128 + report.stopped_by)
    click.echo(messages.report_line(report, out))
    if report.survey.num_taken < report.survey.num_wanted and report.num_traces:
        cache = open_cache(str(out), allow_unsealed=True)
        click.echo(messages.estimate_line(report, cache))


def program() -> NoReturn:
    """What the installed command runs: `main`, then an end that nothing can spoil.

    Threads that vLLM leaves behind now and then abort the interpreter while it is torn down
    ("terminate called without an active exception"), after all is written and said.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exited:
        code = exited.code
    if "vllm" in sys.modules and isinstance(code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Run a command: a user's mistake is one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "httpx", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except ModuleNotFoundError as error:
        click.echo(
            f"cache-teacher: {error.name} is not installed; with a GPU: pip install "
            "'.[teacher]' in a checkout, without one: pip install '.[cpu]'",
            err=True,
        )
        sys.exit(1)
    except (CacheError, EngineError, ValueError) as error:
        click.echo(f"cache-teacher: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # the disk is full, or may not be written
        click.echo(
            f"cache-teacher: {error}; what was finished before is kept, mend this and run the "
            "same command again",
            err=True,
        )
        sys.exit(1)
