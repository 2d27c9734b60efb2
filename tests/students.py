"""Small students with the tokenizer of the fake teacher, and where traces lie in their batches."""

import torch
from fakes import TOKENS, VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": VOCAB_SIZE - 1,
}  # fmt: skip
WINDOW = 6  # shorter than any trace
# A model of each kind that stands between a cache and its loss in another way. Gemma: softcaps of
# scores and logits, tied and scaled embeddings. Weights are larger than usual, so that attention
# has something to say.
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, initializer_range=0.2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, initializer_range=0.2, tie_word_embeddings=False)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE, initializer_range=0.2, sliding_window=WINDOW, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, attn_implementation="eager",
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE, initializer_range=0.2, sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, initializer_range=0.2, sliding_window=WINDOW)
    ),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE, initializer_range=0.2, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=24, norm_topk_prob=True, output_router_logits=True,
        )
    ),
}  # fmt: skip


EXPERTS = {
    "qwen3 moe": FAMILIES["qwen3 moe"],
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SHAPE, initializer_range=0.2, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=None,
        )
    ),
}  # fmt: skip


def make_family(name):
    torch.manual_seed(0)
    return FAMILIES[name]()


def make_tokenizer(tokens=TOKENS):
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_model(vocab_size=VOCAB_SIZE, *, tied=True, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {
        **SHAPE,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    } | settings
    return Qwen3ForCausalLM(Qwen3Config(**settings))


def make_student(folder, tokens=TOKENS, **settings):
    """A two-layer Qwen3 and its tokenizer as a Hugging Face folder."""
    make_model(**settings).save_pretrained(folder)
    make_tokenizer(tokens).save_pretrained(folder)
    return str(folder)


def segments_of(batch):
    """Row, first column and end of what each trace takes of a micro-batch, by its positions."""
    num_rows, width = batch.input_ids.shape
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(width).expand(num_rows, -1)
    for row in range(num_rows):
        starts = torch.nonzero(positions[row] == 0)[:, 0].tolist()
        yield from (
            (row, first, end) for first, end in zip(starts, [*starts[1:], width], strict=True)
        )
