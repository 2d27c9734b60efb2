"""The reference teacher: Hugging Face `transformers`, one trace at a time.

Deliberately slow and simple: vLLM's rows are checked against these.
Letters: V vocabulary, K kept candidates, T tokens of one forward pass.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.engines import EngineError, Sampling, TeacherFacts, TeacherRequest, TeacherRows
from teacher_cache.engines.checks import (
    check_model,
    check_request,
    check_rows,
    one_line,
    settings_hash,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Chunk size of a second pass, which has no other batch to differ by. Chunks of 2^n tokens gave
# equal bits on a CPU; an odd size makes its kernels add in another order.
OTHER_CHUNK_TOKENS = 33


class TransformersTeacher:
    """A causal language model of `transformers` as a `Teacher`.

    A trace depends only on its request, including the seed, never on other requests.

    Args:
        model: Folder, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "bfloat16" or
            "float16". The logits are always float32 if the head is a plain linear layer.
        top_k: Candidates per row (K), at most the vocabulary.
        max_model_len: Tokens in the longest trace, prompt included; the model's own limit if
            that is lower, or if this is None.
        sampling: Settings for drawing new tokens; None for an engine that only scores.
        device: "cpu", "cuda", ...; None for a GPU if there is one.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        EngineError: If the model cannot be loaded.
    """

    facts: TeacherFacts
    # Given tokens per forward pass; may change between runs. [T, V] in float64 stays near
    # 300 MB at V = 152k.
    chunk_tokens: int = 256

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        top_k: int,
        max_model_len: int | None = None,
        sampling: Sampling | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_model(model, revision)
        import torch
        import transformers
        from safetensors import SafetensorError

        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto" and self._device.type == "cpu":
            dtype = "float32"  # as vLLM does: CPUs are slow in half precision
        try:
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
            )
            self._stop_ids = frozenset[int]()
            if sampling is not None:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    model, revision=revision, trust_remote_code=trust_remote_code
                )
                self._stop_ids = _stop_ids(
                    tokenizer.eos_token_id,
                    network.generation_config.eos_token_id,
                    list(sampling.stop_ids),
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise EngineError(f"model {model!r}: {one_line(error)}") from error
        head_dtype = _use_float32_head(network)
        self._network = network.to(self._device).eval()
        self._sampling = sampling
        self._top_k = top_k
        text_config = network.config.get_text_config()
        self.facts = TeacherFacts(
            engine="transformers",
            engine_version=transformers.__version__,
            dtype=str(network.dtype).removeprefix("torch."),
            head_dtype=str(head_dtype).removeprefix("torch."),
            vocab_size=text_config.vocab_size,
            max_model_len=_context(model, text_config, max_model_len),
            settings={
                "architecture": type(network).__name__,
                "model_config_hash": settings_hash(network.config.to_dict()),
            },
        )
        if not 1 <= top_k <= self.facts.vocab_size:
            raise EngineError(
                f"model {model!r}: expected top_k from 1 to the vocabulary's "
                f"{self.facts.vocab_size}, got {top_k}"
            )

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Generate or score every request, one after the other."""
        for request in requests:
            check_request(
                request,
                vocab_size=self.facts.vocab_size,
                max_model_len=self.facts.max_model_len,
                sampling=self._sampling,
            )
            rows = self._trace(request)
            check_rows(rows)
            yield rows

    def close(self) -> None:
        """Free the model."""
        self._network = None

    def _trace(self, request: TeacherRequest) -> TeacherRows:
        import torch

        tokens, num_given = list(request.token_ids), len(request.token_ids)
        capture_given = request.capture_prompt or request.max_new_tokens == 0
        max_tokens = min(num_given + request.max_new_tokens, self.facts.max_model_len)
        finish_reason = "scored" if request.max_new_tokens == 0 else "length"
        generator = torch.Generator().manual_seed(request.seed)
        logits_TV, cache = torch.empty(0), None
        pieces = [_candidates(torch.empty(0, self.facts.vocab_size), [], self._top_k)]
        with torch.inference_mode():
            for start in range(0, num_given, self.chunk_tokens):
                logits_TV, cache = self._forward(tokens[start : start + self.chunk_tokens], cache)
                over = tokens[start + 1 : start + 1 + len(logits_TV)]
                if capture_given:
                    pieces.append(_candidates(logits_TV[: len(over)], over, self._top_k))
            while len(tokens) < max_tokens:
                if len(tokens) > num_given:
                    logits_TV, cache = self._forward(tokens[-1:], cache)
                tokens.append(_draw(logits_TV[-1], tokens, self._sampling, generator))
                pieces.append(_candidates(logits_TV[-1:], tokens[-1:], self._top_k))
                if tokens[-1] in self._stop_ids:
                    finish_reason = "stop"
                    break
        return TeacherRows(
            request_id=request.request_id,
            token_ids=np.array(tokens, dtype=np.int32),
            num_given=num_given,
            first_row=1 if capture_given else num_given,
            row_ids=torch.cat([ids for ids, _ in pieces]).numpy(),
            row_logprobs=torch.cat([logprobs for _, logprobs in pieces]).numpy(),
            finish_reason=finish_reason,
        )

    def _forward(self, tokens: Sequence[int], cache: object) -> "tuple[Tensor, object]":
        """Logits [T, V] after each of `tokens`, and the key-value cache that holds them."""
        import torch

        output = self._network(
            input_ids=torch.tensor([tokens], device=self._device),
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[0], output.past_key_values


def _candidates(logits_TV: "Tensor", tokens: Sequence[int], top_k: int) -> "tuple[Tensor, Tensor]":
    """Ids and logprobs [T, 1 + K] of `tokens` and of the most probable ones, on the CPU."""
    import torch

    logprobs_TV = logits_TV.double().log_softmax(dim=-1)
    tokens_T1 = torch.tensor(tokens, dtype=torch.int64, device=logits_TV.device)[:, None]
    top = logprobs_TV.topk(top_k, dim=-1)
    ids = torch.cat([tokens_T1, top.indices], dim=1)
    logprobs = torch.cat([logprobs_TV.gather(1, tokens_T1), top.values], dim=1)
    return ids.int().cpu(), logprobs.float().cpu()


def _draw(
    logits_V: "Tensor",
    tokens: Sequence[int],
    sampling: Sampling | None,
    generator: "torch.Generator",
) -> int:
    """Sample one token after `tokens`: penalty, temperature, min-p, top-k, top-p, as vLLM does."""
    import torch

    if sampling is None:
        raise EngineError("this engine was made without `sampling`: it can only score")
    logits_V = logits_V.float().cpu()
    if sampling.repetition_penalty != 1.0:
        logits_V = logits_V.clone()
        seen = torch.tensor(sorted(set(tokens)))
        of_seen, penalty = logits_V[seen], sampling.repetition_penalty
        logits_V[seen] = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.min_p > 0:
        lowest = logits_V.max() + math.log(sampling.min_p)
        logits_V = logits_V.masked_fill(logits_V < lowest, float("-inf"))
    if 0 < sampling.top_k < len(logits_V):
        lowest_kept = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest_kept, float("-inf"))
    probs = logits_V.softmax(dim=-1).sort(descending=True, stable=True)
    mass_before = probs.values.cumsum(dim=-1) - probs.values
    kept_probs = probs.values.masked_fill(mass_before >= sampling.top_p, 0.0)
    return int(probs.indices[torch.multinomial(kept_probs, 1, generator=generator)])


def _stop_ids(*ends: int | list[int] | None) -> frozenset[int]:
    """Every end-of-sequence id of a tokenizer and a generation config."""
    ids: set[int] = set()
    for end in ends:
        ids.update(end if isinstance(end, list) else [] if end is None else [end])
    return frozenset(ids)


def _use_float32_head(network: Any) -> object:  # noqa: ANN401 (transformers is untyped here)
    """Let the last layer compute float32 logits; returns the torch dtype it ends up with.

    Half precision logits move the logprobs by up to 0.1 nat. The weights keep their values, in a
    copy: they may be shared with the input embeddings.
    """
    import torch

    head = network.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return network.dtype  # quantised or unusual: left as the model has it
    if head.weight.dtype != torch.float32:
        wide = torch.nn.Linear(head.in_features, head.out_features, head.bias is not None)
        wide.load_state_dict(head.state_dict())
        wide.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        network.set_output_embeddings(wide)
    return torch.float32


def _context(model: str, text_config: object, wanted: int | None) -> int:
    """Largest number of tokens in a trace."""
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    if limit is None and wanted is None:
        raise EngineError(f"model {model!r}: states no context length; `max_model_len` is needed")
    return min(length for length in (limit, wanted) if length is not None)
