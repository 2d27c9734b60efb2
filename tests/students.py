"""Small students with the tokenizer of the fake teacher."""

import torch
from fakes import TOKENS, VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def make_tokenizer(tokens=TOKENS):
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_model(vocab_size=VOCAB_SIZE, *, tied=True, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": VOCAB_SIZE - 1,  # not the one that ends the traces
        "pad_token_id": None,
    } | settings
    return Qwen3ForCausalLM(Qwen3Config(**settings))


def make_student(folder, tokens=TOKENS, **settings):
    """A two-layer Qwen3 and its tokenizer as a Hugging Face folder."""
    make_model(**settings).save_pretrained(folder)
    make_tokenizer(tokens).save_pretrained(folder)
    return str(folder)
