"""Attention over traces of which each process of a team has a part (Ulysses, arXiv 2309.14509).

Everything but attention works on a token by itself, and so on a part of the tokens. For attention
the team changes sides: each process gets all tokens of some heads, and gives their outputs back.
Several traces may share a row: attention is then told how long each is, and takes one by one.

Letters: P processes of a team, B rows, H heads, T tokens of a row, t = T / P, d size of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from student_train.batch.micro_batch import RowLengths
from student_train.model.attention import caps_scores, keeps_traces_apart

_NAME = "whole_sequence"  # no mask is made for a name that `transformers` does not know
_PROBE_LENGTH = 12
_PROBE_TOLERANCE = 1e-4  # relative; rounding is below 1e-6


def share_sequences(model: PreTrainedModel, team: dist.ProcessGroup) -> None:
    """Let a model's attention, in place, work on rows of which each of the team has a part.

    The parts lie in the order of the team's ranks and are equally long.

    Args:
        model: Student that `check_sharing` has let through.
        team: Processes that share every trace.
    """
    AttentionInterface.register(_NAME, _Attention(team))
    model.set_attn_implementation(_NAME)


def check_sharing(model: PreTrainedModel, num_parts: int) -> bool:
    """Refuse a student whose attention cannot be shared by so many processes.

    Args:
        model: Student on the CPU, as it was loaded, with its weights.
        num_parts: Number of processes of a team.

    Returns:
        Whether traces may share a row too.

    Raises:
        ValueError: If it cannot.
    """
    _check_shape(model, num_parts)
    before = model.config._attn_implementation
    expected = _probe(model)
    attention = _Attention(None)
    AttentionInterface.register(_NAME, attention)
    model.set_attn_implementation(_NAME)
    found = _probe(model)
    is_asked = attention.num_calls == model.config.get_text_config().num_hidden_layers
    may_pack = keeps_traces_apart(model, by_lengths=True)
    model.set_attn_implementation(before)
    if not is_asked or not (found - expected).norm() <= _PROBE_TOLERANCE * expected.norm():
        raise ValueError(
            f"--context-parallel: {type(model).__name__} does more with its tokens than causal "
            "attention, so that they cannot be divided among processes; leave it out"
        )
    return may_pack


class _Attention:
    """Causal attention in the way of `transformers`, over the whole rows of a team."""

    def __init__(self, team: dist.ProcessGroup | None) -> None:
        self._team = team  # None where this process has whole rows
        self.num_calls = 0

    # Else --compile makes code for every call, until it gives up.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        lengths_in_row: RowLengths | None = None,
        **_others: Any,  # noqa: ANN401 (a family's own arguments, which the probe judges)
    ) -> tuple[Tensor, None]:
        """Take [B, H, t, d], with H the number of key-value heads for keys and values.

        With `lengths_in_row`, the one row holds several traces: no token sees another trace's.

        Returns:
            [B, t, H, d]
        """
        self.num_calls += 1
        if self._team is not None:
            num_copies = max(1, self._team.size() // key.shape[1])
            key, value = (x.repeat_interleave(num_copies, dim=1) for x in (key, value))
            query, key, value = (_whole_rows(x, self._team) for x in (query, key, value))
        # One by one, and not with a mask, which would be as large as the row's length squared.
        lengths = lengths_in_row.lengths if lengths_in_row else (query.shape[2],)
        traces = zip(
            *(torch.split(x, list(lengths), dim=2) for x in (query, key, value)), strict=True
        )
        outputs = [
            scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            for q, k, v in traces
        ]  # fmt: skip
        output = torch.cat(outputs, dim=2) if lengths_in_row else outputs[0]
        if self._team is not None:
            output = _all_heads(output, self._team)
        return output.transpose(1, 2).contiguous(), None


def _whole_rows(part: Tensor, team: dist.ProcessGroup) -> Tensor:
    """[B, H, t, d] of each process -> [B, H / P, T, d]."""
    sent = torch.stack(part.chunk(team.size(), dim=1))
    return _exchanged(sent, team).movedim(0, 2).flatten(2, 3)


def _all_heads(whole: Tensor, team: dist.ProcessGroup) -> Tensor:
    """[B, H / P, T, d] of each process -> [B, H, t, d]."""
    sent = torch.stack(whole.chunk(team.size(), dim=2))
    return _exchanged(sent, team).movedim(0, 1).flatten(1, 2)


def _exchanged(sent: Tensor, team: dist.ProcessGroup) -> Tensor:
    """Entry i goes to the team's process i; gradients come back the same way."""
    received: Tensor = _Exchange.apply(sent, team)  # type: ignore[no-untyped-call]  # torch's
    return received


class _Exchange(torch.autograd.Function):
    """torch's own exchange with gradients is deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, team: dist.ProcessGroup) -> Tensor:  # noqa: ANN401  # torch's
        """Send entry i of `sent` to process i."""
        ctx.team = team
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent.contiguous(), group=team)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # torch's
        """Send the gradients back."""
        received = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, gradients[0].contiguous(), group=ctx.team)
        return received, None


def _check_shape(model: PreTrainedModel, size: int) -> None:
    config, name = model.config.get_text_config(), type(model).__name__
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        fitting = [
            n
            for n in range(2, num_heads + 1)
            if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        ]
        raise ValueError(
            f"--context-parallel {size}: {name} has {num_heads} attention heads and {num_kv_heads} "
            "key-value heads, which so many processes cannot divide; use "
            f"{' or '.join(map(str, fitting)) or 'none'}"
        )
    layer_types = getattr(config, "layer_types", None) or ("full_attention",)
    if set(layer_types) != {"full_attention"} or getattr(config, "sliding_window", None):
        raise ValueError(
            f"--context-parallel: {name} has layers without attention to all tokens before "
            "(sliding windows, chunks or recurrent layers), which are not divided; leave it out"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"--context-parallel: {name}'s rotary frequencies depend on the length of a row, of "
            "which each process has a part; leave it out"
        )
    if caps_scores(model):
        raise ValueError(
            f"--context-parallel: {name} caps its attention scores, which torch's attention "
            "leaves out; leave it out"
        )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Hidden states of a few tokens."""
    was_training = model.training
    model.train(mode=False)
    weight = model.get_input_embeddings().weight
    ids = torch.arange(_PROBE_LENGTH, device=weight.device)[None] % len(weight)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    return hidden
