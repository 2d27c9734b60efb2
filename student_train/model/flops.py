"""Floating point operations of training, by formula and by PyTorch's counter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from student_train.batch.micro_batch import MicroBatch, micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of, load_model, output_layer
from teacher_cache.format import Cache

FORMULA = (
    "6 x weights x positions + 6 x layers x heads x head size x sum of (positions of a trace)^2 "
    "+ 6 x vocabulary x hidden size x tokens in the loss"
)


@dataclass(frozen=True)
class FlopFormula:
    """FLOPs of forward and backward of a decoder and its loss: multiply and add are 2 FLOPs.

        6 P n + 6 A sum_i n_i^2 + 6 V D m

    n_i is the number of positions of trace i, n that of all traces, m that of loss tokens. P is the
    number of weights in the body's matrices, experts counted by the share that a token is sent to;
    A is layers x heads x head size, half of each square being masked; the head's three products run
    on the loss tokens alone. The backward counts as two forwards, or as one for frozen weights.
    Norms, softmax, optimizer, embedding lookup and padding are left out.
    """

    body_weights: int
    attention_width: int
    head_weights: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FlopFormula":
        """The formula's constants of a model."""
        config = model.config.get_text_config()
        num_heads = getattr(config, "num_attention_heads", 0)  # recurrent models have none
        head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        head = output_layer(model).weight
        embeddings = {id(model.get_input_embeddings().weight), id(head)}
        body_weights = 0.0
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and id(weight) not in embeddings:
                is_expert = experts and ".experts." in name
                share = config.num_experts_per_tok / experts if is_expert else 1.0
                body_weights += weight.numel() * share * _products(weight) / 3
        return cls(
            body_weights=round(body_weights),
            attention_width=config.num_hidden_layers * num_heads * head_size,
            head_weights=head.numel() * _products(head) // 3,
        )

    def flops(self, num_positions: Sequence[int], num_valid: int) -> int:
        """FLOPs of a forward and backward.

        Args:
            num_positions: Number of positions of each trace.
            num_valid: Number of loss tokens of all traces.
        """
        return 6 * (
            self.body_weights * sum(num_positions)
            + self.attention_width * sum(n * n for n in num_positions)
            + self.head_weights * num_valid
        )


def _products(weight: Tensor) -> int:
    """Number of products of a matrix: outputs, gradients of inputs and, if trained, its own."""
    return 3 if weight.requires_grad else 2


def counted_flops(student: StudentWithLoss, batch: MicroBatch) -> int:
    """FLOPs that PyTorch counts in forward and backward: whole attention squares, and padding.

    Use attn_implementation="eager" on the CPU: the counter does not know its fused attention.
    """
    in_place = {torch.ops.aten.addmm_: _addmm_flops}  # of the head; the counter lacks this one
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = student(batch)
        torch.autograd.backward(loss)
    student.zero_grad()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class FlopComparison:
    """One forward and backward, by formula and as counted."""

    num_positions: int
    by_formula: int
    counted: int


def compare_flops(
    name: str, cache: Cache, selections: Sequence[TokenSelection]
) -> list[FlopComparison]:
    """Count the work on the first trace of a cache, for every selection; on the CPU.

    Args:
        name: Name of the student.
        cache: Cache with at least one trace.
        selections: Selections of the trace's tokens.
    """
    model, _ = load_model(name, dtype=torch.float32)
    model.set_attn_implementation("eager")
    student, formula = StudentWithLoss(model, head_of(model)), FlopFormula.of(model)
    trace = next(cache.read_held(cache.traces[:1]))
    compared = []
    for selection in selections:
        batches = micro_batches(
            selection.selected([trace]), batch_tokens=len(trace), loss_reduction="token"
        )
        compared.append(
            FlopComparison(
                sum(sum(batch.num_positions) for batch in batches),
                sum(formula.flops(batch.num_positions, batch.num_valid) for batch in batches),
                sum(counted_flops(student, batch) for batch in batches),
            )
        )
    return compared


def count_parameters(name: str) -> int:
    """Of a model, without its weights being loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    return sum(parameter.numel() for parameter in model.parameters())


def _addmm_flops(total: torch.Size, left: torch.Size, right: torch.Size, **_others: object) -> int:
    return 2 * left[0] * left[1] * right[1]
