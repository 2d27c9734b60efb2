"""Settings of a capture, checked before anything heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teacher_cache.capture.job import ONLY_WORKER
from teacher_cache.capture.replica_gpus import replica_gpus
from teacher_cache.engines.server.settings import ServerSettings, server_address
from teacher_cache.engines.start import DTYPES, ENGINES, ROWS_FROM
from teacher_cache.format import MAX_K, CachePath, parse_worker
from teacher_cache.sources import ASSISTANT_TURNS, PROMPT_TURNS, Input, RowColumns, TraceSlice
from teacher_cache.terminal.option import check_options, option

_input = partial(option, group="Input")
_teacher = partial(option, group="Teacher")
_kept = partial(option, group="What is kept")
_sampling = partial(option, group="Sampling")
_scale_out = partial(option, group="Scale-out")


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Settings for reading and rendering rows, shared by captures and `preview`."""

    id_field: str = _input("Column with the trace's id.", default=RowColumns.id_field)
    prompt_field: str | None = _input(
        "Column with the prompt, text or messages.", default=None, unset="the usual names"
    )
    apply_chat_template: bool = _input(
        "Use text prompts as the user's turn of a chat; for chat models.", default=False
    )
    drop_system: bool = _input("Leave out the rows' system prompts.", default=False)
    dataset_config: str | None = _input("Configuration of a hub dataset.", default=None)
    split: str = _input("Split of a hub dataset or a saved one.", default=Input.split)
    model: str = _teacher("Teacher: a model folder or a hub id.", basic=True)
    revision: str | None = _teacher("Branch, tag or commit of a hub id.", default=None)
    template_arg: Mapping[str, object] = _teacher(
        "Argument of the chat template, such as enable_thinking=true; repeatable.",
        default_factory=dict,
    )
    think_open: str | None = _teacher(
        "Text that the teacher writes before its chain of thought, white space included (\\n is a "
        "line break); for teachers whose chat template does not show it.",
        default=None,
        unset="read off the chat template",
    )
    think_close: str | None = _teacher(
        "Text that the teacher writes between chain of thought and answer, likewise.",
        default=None,
        unset="read off the chat template",
    )
    trust_remote_code: bool = _teacher(
        "Run code that comes with the model, for its configuration, tokenizer and network; only "
        "from sources that you trust.",
        default=False,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if (self.think_open is None) != (self.think_close is None):
            raise ValueError("--think-open and --think-close: expected both or neither")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(RowsConfig):
    """Settings of both ways of capturing."""

    limit: int | None = _input(
        "Capture only this many traces, and estimate time and disk for all of them.",
        default=None,
        basic=True,
        at_least=1,
        unset="all",
    )
    ids_file: Path | None = _input(
        "File of ids, one per line: use only rows that have one of them.", default=None
    )
    strict: bool = _input(
        "Stop at the first unusable row; otherwise such rows go into rejects.jsonl.",
        default=False,
    )
    engine: str = _teacher(
        "Program that runs the teacher; transformers is for small teachers and machines "
        "without vLLM, server for a vLLM server that runs already (--url).",
        default="vllm",
        basic=True,
        choices=ENGINES,
    )
    url: str | None = _teacher(
        "Address of the server, http://HOST:PORT; VLLM_API_KEY is sent if it is set.",
        default=None,
        unset="none",
    )
    served_model: str | None = _teacher(
        "The teacher's name at the server.", default=None, unset="that of its only model"
    )
    in_flight: int = _teacher(
        "Requests sent to the server at once.", default=ServerSettings.in_flight, at_least=1
    )
    server_tolerance: float = _teacher(
        "Largest mean KL between two answers of the server to the same question, in nats per "
        "token.",
        default=ServerSettings.tolerance,
        above=0,
    )
    dtype: str = _teacher(
        "Precision of the teacher's weights; auto uses the checkpoint's on a GPU and float32 on "
        "a CPU.",
        default="auto",
        choices=DTYPES,
    )
    max_model_len: int | None = _teacher(
        "Context length of the engine, in tokens; lower it if memory runs out.",
        default=None,
        at_least=2,
        unset="the model's own",
    )
    engine_arg: Mapping[str, object] = _teacher(
        "Engine argument of vLLM, such as max_num_seqs=128; repeatable.", default_factory=dict
    )
    rows_from: str = _teacher(
        "Source of the rows: the logits in vLLM's worker, or the logprobs that vLLM returns, which "
        "is slower.",
        default="worker",
        choices=ROWS_FROM,
    )
    out: CachePath = _kept(
        "Folder or URI of the cache (s3://, gs://, hdfs://); run again to resume.", basic=True
    )
    top_k: int = _kept(
        "Largest number of entries kept per token; disk grows with it.",
        default=64,
        basic=True,
        at_least=1,
        at_most=MAX_K,
    )
    mass: float = _kept(
        "Probability that the kept entries must reach; the fewest that do are kept.",
        default=0.999,
        basic=True,
        above=0,
        at_most=1,
    )
    lead_span: float = _kept(
        "Proportion of every trace to keep, from its start; no student can train on more. Scoring "
        "computes nothing beyond it, generating still writes the whole trace.",
        default=1.0,
        above=0,
        at_most=1,
    )
    num_bands: int = _kept(
        "Bands per trace, N: a lead span is read in steps of 1/N.",
        default=20,
        at_least=1,
        at_most=255,
    )
    journal: Path | None = _kept(
        "Local folder for traces that do not yet fill a shard; for this cache only.",
        default=None,
        unset="in the cache's folder",
    )
    worker: str = _scale_out(
        "Share of the input, as i/n with i from 0: one of n such commands, for example "
        "$SLURM_ARRAY_TASK_ID/8. Or a name, for a process with its own input.",
        default=ONLY_WORKER,
        unset="all of the input",
    )
    num_replicas: int = _scale_out(
        "Engine replicas that Ray places, on this machine or with --ray-address.",
        default=1,
        at_least=1,
    )
    ray_address: str | None = _scale_out(
        "Running Ray cluster: auto, HOST:PORT or ray://HOST:PORT.", default=None
    )
    tensor_parallel_size: int = _scale_out(
        "GPUs per replica; raise it if the teacher does not fit on one.", default=1, at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_engine_args(self.engine, self.engine_arg)
        parse_worker(self.worker)
        if self.on_cluster and self.worker != ONLY_WORKER:
            raise ValueError(
                "--worker is for processes without Ray; leave it out with --num-replicas and "
                "--ray-address"
            )
        if self.tensor_parallel_size > 1 and self.engine != "vllm":
            raise ValueError(f"--tensor-parallel-size is vLLM's; --engine {self.engine} has none")
        if "tensor_parallel_size" in self.engine_arg:
            raise ValueError("--engine-arg: give --tensor-parallel-size instead")
        replica_gpus(self.engine_arg)

        self._check_server()

    def _check_server(self) -> None:
        if self.engine != "server":
            for name in ("url", "served_model", "in_flight", "server_tolerance"):
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(f"--{name.replace('_', '-')}: only --engine server has one")
            return
        if self.url is None:
            raise ValueError("--engine server: give its address, --url http://HOST:PORT")
        server_address(self.url)
        if self.dtype != "auto":
            raise ValueError("--dtype: the server has chosen its own; leave it out")
        if self.on_cluster:
            raise ValueError(
                "--num-replicas and --ray-address start engines; with --engine server the server "
                "has its own replicas"
            )

    @property
    def on_cluster(self) -> bool:
        """Whether Ray places the engines."""
        return self.num_replicas > 1 or self.ray_address is not None


def check_engine_args(engine: str, engine_args: Mapping[str, object]) -> None:
    """Refuse arguments of vLLM for another engine.

    Raises:
        ValueError: If there are any such arguments.
    """
    if engine_args and engine != "vllm":
        raise ValueError(f"--engine-arg: only vLLM takes these; the {engine} engine has none")


_PROMPT_TURNS_HELP = "Turns of the prompt whose tokens get distributions, with --capture-prompt."


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CaptureConfig):
    """`cache-teacher generate`. None stands for the model's own default."""

    prompts: Path = _input(
        "File, folder or hub id of rows with messages, conversations or prompt. A final assistant "
        "turn is answered again.",
        basic=True,
    )
    capture_prompt: bool = _kept(
        "Keep distributions over the prompt's tokens too; a student that trains on the prompt "
        "needs them.",
        default=False,
    )
    prompt_turns: str = _kept(
        _PROMPT_TURNS_HELP, default=RowColumns.prompt_turns, choices=PROMPT_TURNS
    )
    temperature: float | None = _sampling(
        "Sampling temperature; 0 always picks the most probable token.",
        default=None,
        basic=True,
        at_least=0,
        unset="the model's own",
    )
    top_p: float | None = _sampling(
        "Sample from the most probable tokens that reach this probability.",
        default=None,
        above=0,
        at_most=1,
        unset="the model's own",
    )
    sample_top_k: int | None = _sampling(
        "Sample from this many most probable tokens; 0 for all.",
        default=None,
        at_least=0,
        unset="the model's own",
    )
    min_p: float | None = _sampling(
        "Sample from tokens at least this many times as probable as the most probable one.",
        default=None,
        at_least=0,
        at_most=1,
        unset="the model's own",
    )
    repetition_penalty: float | None = _sampling(
        "Divide the logits of earlier tokens by this; 1 for no penalty.",
        default=None,
        above=0,
        unset="the model's own",
    )
    max_new_tokens: int | None = _sampling(
        "Largest number of new tokens per trace; longer answers are cut and count as unfinished.",
        default=None,
        basic=True,
        at_least=1,
        unset="the model's own, or what the context has room for",
    )
    stop_at_tokens: int | None = _sampling(
        "Largest number of tokens per trace, prompt included; for a student that trains with "
        "--trace-tokens.",
        default=None,
        at_least=2,
        unset="the context length",
    )
    samples_per_prompt: int = _sampling(
        "Traces per prompt; they need a temperature above 0.", default=1, basic=True, at_least=1
    )
    seed: int = _sampling("Seed for sampling; a different one gives different traces.", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt_turns(self)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(CaptureConfig):
    """`cache-teacher score`."""

    traces: Path = _input(
        "File, folder or hub id of rows with messages, conversations, prompt and response, or "
        "token_ids.",
        basic=True,
    )
    response_field: str | None = _input(
        "Column with the response.", default=None, unset="the usual names"
    )
    reasoning_field: str | None = _input(
        "Column with the chain of thought, if separate from the response.",
        default=None,
        unset="the usual names",
    )
    assistant_turns: str = _input(
        "Turns of the assistant that become traces: the last one of a conversation, or each of "
        "them, after the messages before it.",
        default=RowColumns.assistant_turns,
        choices=ASSISTANT_TURNS,
    )
    slice: str | None = _input(
        "Score a part of each trace as a sequence of its own: lead, middle or last, such as "
        "middle:0.5.",
        default=None,
        metavar="PART:PROPORTION",
        unset="whole traces",
    )
    capture_prompt: bool = _kept(
        "Keep distributions over the prompt's tokens too; without it the cache is smaller.",
        default=True,
    )
    prompt_turns: str = _kept(
        _PROMPT_TURNS_HELP, default=RowColumns.prompt_turns, choices=PROMPT_TURNS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt_turns(self)
        if self.slice is not None:
            TraceSlice.parse(self.slice)


def _check_prompt_turns(config: GenerateConfig | ScoreConfig) -> None:
    if config.prompt_turns != RowColumns.prompt_turns and not config.capture_prompt:
        raise ValueError("--prompt-turns: no token of the prompt is kept without --capture-prompt")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(RowsConfig):
    """`cache-teacher preview`."""

    prompts: Path | None = _input(
        "Rows as `generate` takes them; show their prompts.", default=None, basic=True
    )
    traces: Path | None = _input(
        "Rows as `score` takes them; show the resulting traces.", default=None, basic=True
    )
    limit: int = _input("Number of rows to show.", default=3, basic=True, at_least=1)
    response_field: str | None = _input(
        "Column with the response.", default=None, unset="the usual names"
    )
    reasoning_field: str | None = _input(
        "Column with the chain of thought, if separate from the response.",
        default=None,
        unset="the usual names",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.traces is not None:
            raise ValueError("--prompts and --traces: expected at most one of them")
