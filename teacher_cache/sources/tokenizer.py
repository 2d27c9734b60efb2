"""The teacher's files: tokenizer, chat template, generation config, fingerprints.

transformers is imported only when something is loaded.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from teacher_cache.engines import EngineError
from teacher_cache.engines.checks import check_model, one_line
from teacher_cache.format import (
    CacheHeader,
    CacheMismatchError,
    content_hash,
    tokenizer_fingerprint,
)
from teacher_cache.sources.chat_template import ChatTemplate, TemplateRefusesError
from teacher_cache.sources.turn_layout import GivenMarks, TurnLayout, read_layout

_SAMPLE_BYTES = 1 << 20  # of each end of a weight file: enough to tell two training runs apart
# Settings of a generation config that neither engine's sampler gets here.
_LEFT_OUT = {
    "bad_words_ids", "diversity_penalty", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "length_penalty", "min_length",
    "min_new_tokens", "no_repeat_ngram_size", "num_beams", "penalty_alpha", "renormalize_logits",
    "sequence_bias", "stop_strings", "suppress_tokens", "begin_suppress_tokens", "token_healing",
    "top_h", "typical_p", "watermarking_config", "max_length", "max_time",
}  # fmt: skip
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}


@dataclass(frozen=True)
class OwnGenerationConfig:
    """The sampling settings and end tokens that a model's generation config names."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 for none
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    end_ids: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()  # further settings in it that would change a sample


@dataclass(frozen=True)
class ModelFiles:
    """A model folder or hub id, without loading its weights."""

    model: str
    revision: str | None
    trust_remote_code: bool = False  # whether code that comes with the model may run

    @property
    def name(self) -> str:
        """The folder's normalised path, or the hub id."""
        return str(Path(self.model)) if Path(self.model).is_dir() else self.model

    def config(self) -> Any:  # noqa: ANN401 (transformers is untyped here)
        """The model's text config."""
        check_model(self.model, self.revision)
        from transformers import AutoConfig

        try:
            # False, not unset: otherwise transformers would ask at the terminal.
            config = AutoConfig.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise EngineError(f"model {self.model!r}: {one_line(error)}") from error
        return config.get_text_config()

    def vocab_size(self) -> int:
        """Width of the model's softmax."""
        return int(self.config().vocab_size)

    def context_length(self, wanted: int | None, *, num_reserved: int = 0) -> int:
        """Largest number of tokens in a trace.

        Args:
            wanted: Upper limit set by the user.
            num_reserved: Tokens of the model's limit that a trace must leave free.

        Raises:
            EngineError: If no limit is set and the model states none.
        """
        limit = getattr(self.config(), "max_position_embeddings", None)
        if limit is None and wanted is None:
            raise EngineError(f"model {self.model!r} states no context length: set --max-model-len")
        lengths = (None if limit is None else limit - num_reserved, wanted)
        return min(length for length in lengths if length is not None)

    def generation_config(self) -> OwnGenerationConfig:
        """The model's defaults for generating; temperature 1 and no cut-off if it names none."""
        from transformers import GenerationConfig

        try:
            own: Any = GenerationConfig.from_pretrained(
                self.model, revision=self.revision or "main"
            )
        except OSError:  # a model need not have one
            return OwnGenerationConfig()
        named = own.to_diff_dict()  # values from the file, not the library's defaults
        ends = named.get("eos_token_id") or ()
        return OwnGenerationConfig(
            temperature=float(named.get("temperature", 1.0)),
            top_p=float(named.get("top_p", 1.0)),
            top_k=int(named.get("top_k", 0)),
            min_p=float(named.get("min_p") or 0.0),
            repetition_penalty=float(named.get("repetition_penalty") or 1.0),
            max_new_tokens=named.get("max_new_tokens"),
            end_ids=(ends,) if isinstance(ends, int) else tuple(ends),
            left_out=tuple(f"{name}={named[name]!r}" for name in sorted(_LEFT_OUT & named.keys())),
        )

    def tokenizer(self) -> Any:  # noqa: ANN401 (transformers is untyped here)
        """The model's tokenizer."""
        check_model(self.model, self.revision)
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise EngineError(f"model {self.model!r}: {one_line(error)}") from error

    def weights_fingerprint(self) -> str:
        """Identity of the weights.

        For a folder, a hash of its config and of the name, size and both ends of every weight
        file (reading all of a large model would take minutes). For a hub id, the commit that it
        resolves to.
        """
        folder = Path(self.model)
        if not folder.is_dir():
            commit = getattr(self.config(), "_commit_hash", None)
            return f"{self.model}@{commit or self.revision or 'main'}"
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for file in sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_SAMPLE_BYTES))
                opened.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(opened.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:32]


class TeacherTokenizer:
    """The teacher's tokenizer with its chat template, and what that template shows of a turn."""

    def __init__(
        self,
        files: ModelFiles,
        template_args: Mapping[str, object],
        marks: GivenMarks | None = None,
    ) -> None:
        """Load it.

        Args:
            files: Files of the teacher.
            template_args: Passed to the chat template (`enable_thinking`, ...). `today` is the
                date for templates that ask for one.
            marks: Marks named by the user, which override those of the template.

        Raises:
            EngineError: If it cannot be loaded, or its chat template reads no argument of that
                name.
        """
        self._tokenizer = files.tokenizer()
        self._own_ends = files.generation_config().end_ids
        self._marks = marks
        self._layouts: dict[str, TurnLayout] = {}
        try:
            self.template = ChatTemplate(self._tokenizer, template_args)
        except ValueError as error:
            raise EngineError(f"model {files.model!r}: {error}") from error

    @property
    def size(self) -> int:
        """Number of ids with a meaning; the teacher's softmax may be wider."""
        return len(self._tokenizer)

    @property
    def end_id(self) -> int | None:
        """The end-of-sequence token."""
        end_id: int | None = self._tokenizer.eos_token_id
        return end_id

    @property
    def begin_id(self) -> int | None:
        """The beginning-of-sequence token."""
        begin_id: int | None = self._tokenizer.bos_token_id
        return begin_id

    @property
    def fingerprint(self) -> str:
        """Fingerprint, equal for tokenizers whose ids mean the same."""
        return tokenizer_fingerprint(self._tokenizer.get_vocab())

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's special tokens by role: `eos_token`, `pad_token`, ..."""
        named = self._tokenizer.special_tokens_map.items()
        return {name: str(token) for name, token in named if isinstance(token, str)}

    @property
    def added_tokens(self) -> dict[str, dict[str, object]]:
        """Tokens outside the trained vocabulary, with their ids; a student may lack them."""
        decoder = self._tokenizer.added_tokens_decoder.items()
        return {
            str(token): {"id": int(number), "special": bool(token.special)}
            for number, token in decoder
        }

    @property
    def template_hash(self) -> str:
        """Fingerprint of the chat template and its arguments."""
        return content_hash([self.template.text, self.template.arguments])

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """Tokens at which the teacher stops, from its generation config and tokenizer."""
        own = () if self.end_id is None else (self.end_id,)
        return tuple(dict.fromkeys(self.decode([token]) for token in (*own, *self._own_ends)))

    @cached_property
    def terminal_ids(self) -> tuple[int, ...]:
        """Every token that ends a trace: the teacher's, and the one that closes a turn.

        A token that also occurs between reasoning and answer ends no turn by itself.
        """
        own = () if self.end_id is None else (self.end_id,)
        layout = self.layout()
        last = self.encode(layout.end)[-1:]
        is_own = layout.end and self.decode(last) in self.template.added_tokens
        if not is_own or self.decode(last) in (layout.joint or ""):
            last = []
        return tuple(sorted({*self._own_ends, *own, *last}))

    def layout(self, arguments: Mapping[str, object] | None = None) -> TurnLayout:
        """Layout of the assistant's turn, with the user's or a row's arguments."""
        given = self.template.arguments if arguments is None else arguments
        key = content_hash(dict(given))
        if key not in self._layouts:
            self._layouts[key] = self._marked(self._read_layout(given), given)
        return self._layouts[key]

    @property
    def content_hash(self) -> str:
        """Fingerprint of all that turns text into ids; a slow tokenizer's is another each time."""
        try:
            return content_hash(self.definition)
        except EngineError:
            return uuid.uuid4().hex

    @property
    def definition(self) -> str:
        """Content of the tokenizer's `tokenizer.json`.

        Raises:
            EngineError: If it is not a fast tokenizer.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EngineError(
                f"model {self._tokenizer.name_or_path!r}: expected a fast tokenizer "
                f"(tokenizer.json), found {type(self._tokenizer).__name__}, which runs in Python"
            )
        text: str = backend.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, with nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character range (first, end) of each id from `encode`."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return offsets

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence, with the tokens that the tokenizer puts first.

        A text that begins with the beginning-of-sequence token gets no second one.
        """
        begin = self._tokenizer.bos_token
        if begin and text.startswith(str(begin)):
            return self.encode(text)
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        if ids and ids[-1] == self.end_id:
            ids.pop()  # some tokenizers also add an end token
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _read_layout(self, arguments: Mapping[str, object]) -> TurnLayout:
        if not self.template.source:
            return TurnLayout("nothing: there is no chat template")
        try:
            return read_layout(self.template, arguments, self.end_tokens)
        except TemplateRefusesError as error:
            return TurnLayout(f"nothing: {error}")

    def _marked(self, found: TurnLayout, arguments: Mapping[str, object]) -> TurnLayout:
        if not found.end:
            found = replace(found, end=next(iter(self.end_tokens), ""))
        if self._marks is None:
            return found
        return self._marks.instead_of(found, self.template, arguments)


def load_tokenizer(
    header: CacheHeader, model: str | None, *, trust_remote_code: bool = False
) -> TeacherTokenizer:
    """The tokenizer of a cache's teacher, or of the student it was retokenised for.

    Args:
        header: Header of the cache.
        model: The teacher's current location, if not the one at capture.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        EngineError: If it is missing.
        CacheMismatchError: If `model` has another tokenizer.
    """
    known, revision = header.teacher, header.teacher_revision
    if header.derived is not None:
        known, revision = str(header.derived.get("student")), None
    files = ModelFiles(model or known, revision if model is None else None, trust_remote_code)
    tokenizer = TeacherTokenizer(files, {})
    if tokenizer.fingerprint != header.tokenizer_fingerprint:
        raise CacheMismatchError(
            f"model {files.model!r} has another tokenizer than the cache is written in, that of "
            f"{known!r}"
        )
    return tokenizer
