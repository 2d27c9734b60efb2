"""Loading of the student, and its checks against the cache and the loss."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from student_train.model.attention import caps_scores
from teacher_cache.format import CacheHeader, CacheMismatchError, tokenizer_fingerprint
from teacher_cache.format.checksums import sha256_of

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja")
_PROBE_LENGTH = 8
_PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a forgotten scale or cap is far off


@dataclass(frozen=True)
class HeadScaling:
    """logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Hide progress bars: loading and writing take seconds, and bars would obscure messages."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def load_model(
    name: str, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: Folder or hub id.
        revision: Revision of the hub repository.
        dtype: Dtype of the weights; None keeps the stored one.

    Raises:
        ValueError: If it cannot be loaded, saying why in one line.
    """
    tokenizer = load_tokenizer(name, revision=revision)
    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype or "auto"
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    if (Path(name) / "adapter_config.json").is_file():  # else that of the model below the adapters
        model.generation_config = GenerationConfig.from_pretrained(name)
    if caps_scores(model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa leaves the cap out, without a word
    return model, tokenizer


def empty_model(shape: PreTrainedConfig) -> PreTrainedModel:
    """Build a float32 model whose weights are on "meta" and take no memory.

    Buffers are real: few, and computed from the configuration.

    Args:
        shape: Configuration of a model that `load_model` loaded.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model.tie_weights()  # which registered them anew
    return model


def stored_dtype(name: str, *, revision: str | None = None) -> torch.dtype | None:
    """Dtype of the weights of a stored model by its config; None where that does not say.

    For adapters, that of the model below them.

    Raises:
        ValueError: If its config cannot be read, saying why in one line.
    """
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        dtype = AutoConfig.from_pretrained(name, revision=revision).dtype
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    return dtype if isinstance(dtype, torch.dtype) else None


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ValueError: If it cannot be loaded, saying why in one line.
    """
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ValueError(f"model {name!r} cannot be loaded: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error


def check_student(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: CacheHeader
) -> None:
    """Refuse a student whose token ids differ in meaning from the cache's.

    Beyond the tokens, models pad their vocabularies to different widths. Either may be wider: see
    `vocabulary.within_vocabulary`.

    Raises:
        CacheMismatchError: If the tokenizers differ, or the student lacks tokens.
        ValueError: If the student is an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"student {name!r} is an adapter, and training below it would be lost: merge it into "
            "its model first (peft: merge_and_unload), or train with --lora-output merged"
        )
    vocabulary = tokenizer.get_vocab()
    fingerprint = tokenizer_fingerprint(vocabulary)
    if fingerprint != header.tokenizer_fingerprint:
        raise CacheMismatchError(
            f"student {name!r} has a tokenizer of {len(vocabulary)} tokens (fingerprint "
            f"{fingerprint[:8]}), the cache was made with teacher {header.teacher!r} and its "
            f"tokenizer of {header.tokenizer_size} (fingerprint "
            f"{header.tokenizer_fingerprint[:8]}). Carry the cache over to the student's tokens "
            "first: cache-teacher retokenize"
        )
    num_ids, num_tokens = output_layer(model).weight.shape[0], max(vocabulary.values()) + 1
    if num_ids < num_tokens:
        raise CacheMismatchError(
            f"student {name!r} has {num_ids:,} ids, its tokenizer {num_tokens:,}: it lacks tokens "
            "that the teacher has. Choose a student with a row for every token."
        )


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to logits.

    Raises:
        ValueError: If the model is not a body with such a layer on top.
    """
    output: object = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or model.base_model is model:
        raise ValueError(f"{type(model).__name__}: expected a body and a linear head on top of it")
    return output


def head_of(model: PreTrainedModel) -> HeadScaling:
    """Scaling between the body's hidden states and the logits, beside a linear map.

    Raises:
        ValueError: If the model's logits differ from those that the loss would compute.
    """
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    head = HeadScaling(scale, getattr(config, "final_logit_softcapping", None))
    _check_head(model, head)
    return head


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: HeadScaling) -> None:
    """Compare the model's own logits of a few tokens with those that the loss would compute."""
    output = output_layer(model)
    was_training = model.training
    model.train(mode=False)
    device = output.weight.device
    ids = torch.arange(_PROBE_LENGTH, device=device)[None] % output.weight.shape[0]
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = output(hidden).float() * head.logit_scale
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    model.train(was_training)
    if not expected.isfinite().all():
        raise ValueError(
            f"{type(model).__name__}: its logits are not finite numbers; is it damaged?"
        )
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= _PROBE_TOLERANCE:
        raise ValueError(
            f"{type(model).__name__}: its logits are not softcap(scale * linear(hidden)) with "
            f"logit_scale={head.logit_scale} and softcap={head.softcap} from its config (they "
            f"differ by {error:.1%}); the loss would train a different model: not supported."
        )


def chosen_experts(model: PreTrainedModel) -> int:
    """Number of experts of a layer that work on each position.

    Raises:
        ValueError: If the model is no mixture of experts with routers that are to be balanced.
    """
    config = model.config.get_text_config()
    num_chosen: int | None = getattr(config, "num_experts_per_tok", None)
    if num_chosen is None or getattr(config, "router_aux_loss_coef", None) is None:
        raise ValueError(
            f"--router-aux-loss-coef: {type(model).__name__} has no routers with an auxiliary "
            "loss; leave it out"
        )
    return num_chosen


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, in order."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel) -> None:
    """Apply `torch.compile` to every block, in place; lengths may differ from batch to batch.

    Blocks are alike, so one compilation serves all, and the code around them (masks,
    checkpointing, the loss) stays as it is.

    Raises:
        ValueError: If the model does not name its blocks.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} does not name its layers: leave --compile out")
    for layer in layers:
        layer.compile(dynamic=True)


def student_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the names, shapes and first values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        first = parameter.detach().flatten()[:1024].float().cpu()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:32]


def model_fingerprint(model: str) -> str:
    """Hash of a folder's weights, configuration and tokenizer, or commit of a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model} {AutoConfig.from_pretrained(model)._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted({file for kind in _MODEL_FILES for file in folder.glob(kind)}):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
