"""The student's attention: its backend, and whether traces may share a row."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from student_train.batch.micro_batch import RowLengths

# Chunks are counted from a row's first token, whatever its positions are: a probe shorter than a
# chunk would not notice.
_SEPARABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
_PROBE_LENGTHS = (5, 7)
_PROBE_TOLERANCE = 1e-4  # relative; rounding is below 1e-6, and what leaks is far above


def prepare_attention(
    model: PreTrainedModel, wanted: str | None, *, packing: bool, half_precision: bool
) -> str:
    """Choose the attention backend, and the layout of micro-batches that suits it.

    Args:
        model: Student.
        wanted: Backend by its name in `transformers`. None takes FlashAttention where it is
            installed and usable, else the backend that the model was loaded with.
        packing: Whether traces may share a row, which the student keeps apart; see
            `keeps_traces_apart`, which is asked before FlashAttention is set: that needs a GPU.
        half_precision: Whether matrix products are in half precision, as FlashAttention requires.

    Returns:
        One of `packing.LAYOUTS`.

    Raises:
        ValueError: If the backend is not available, or would compute a different model.
    """
    layout = "packed" if packing else "alone"
    if wanted is None and half_precision and model._supports_flash_attn:
        wanted = _installed_flash_attention()
    if wanted is None:
        return layout
    is_flash = "flash" in wanted
    if is_flash and not half_precision:
        raise ValueError(f"attention {wanted!r} needs half precision: add --dtype bfloat16")
    if wanted == "sdpa" and caps_scores(model):
        raise ValueError(
            f"attention 'sdpa' leaves out the cap of attention scores that {type(model).__name__} "
            "has: it would train a different model. Use 'eager' or 'flash_attention_2'"
        )
    try:
        model.set_attn_implementation(wanted)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"attention {wanted!r} cannot be used here: {reason}") from error
    return "flat" if is_flash and layout == "packed" else layout


def _installed_flash_attention() -> str | None:
    """The fastest FlashAttention that is installed for the GPU there is."""
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if is_hopper and is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


def caps_scores(model: PreTrainedModel) -> bool:
    """Whether attention scores go through a soft cap, as in Gemma 2."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


@contextlib.contextmanager
def known_rows(*, hold_several: bool) -> Iterator[None]:
    """Tell `transformers` whether rows hold several traces while it makes its masks.

    By itself it looks for positions that start over, and waits for the device to know.
    """
    original = masking_utils.find_packed_sequence_indices

    def found(position_ids: Tensor) -> Tensor | None:
        if not hold_several:
            return None
        before = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = found
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


@torch.no_grad()
def keeps_traces_apart(model: PreTrainedModel, *, by_lengths: bool = False) -> bool:
    """Whether positions that restart at 0 hide from a trace whatever precedes it in its row.

    They do for attention in `transformers`, but not for recurrent layers and older models.

    Args:
        model: Student on the CPU.
        by_lengths: Whether its attention is told the lengths too, as `context_parallel`'s is.
    """
    body = model.base_model
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return False
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if not set(layer_types) <= _SEPARABLE_LAYERS:
        return False
    was_training = model.training
    model.train(mode=False)
    device = next(body.parameters()).device
    ids = torch.arange(sum(_PROBE_LENGTHS), device=device)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    positions = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])
    told = {"lengths_in_row": RowLengths(_PROBE_LENGTHS)} if by_lengths else {}
    packed = body(
        input_ids=ids, position_ids=positions[None], use_cache=False, **told
    ).last_hidden_state
    parts = [
        body(input_ids=part, use_cache=False).last_hidden_state
        for part in ids.split(_PROBE_LENGTHS, dim=1)
    ]
    model.train(was_training)
    alone = torch.cat(parts, dim=1)
    return bool((packed - alone).norm() <= _PROBE_TOLERANCE * alone.norm())
