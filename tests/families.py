"""Chat templates of real model families, on a tokenizer of bytes and their own marks."""

import importlib.util
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer

TAG = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?[^<>\s'\"{}=%/]{1,40}>|<｜[^<>\s]{1,40}｜>|\[/?[A-Z_]+\]"
    r"|\[\|[a-z]+\|\]|\[e~\[|\]~!?b[\[\]]"
)


def trl_templates():
    """Name -> text of the templates that the package trl ships."""
    (package,) = importlib.util.find_spec("trl").submodule_search_locations
    files = sorted(Path(package, "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text() for file in files if not file.stem.endswith("_training")}


def make_tokenizer(template, end, extra_tokens=()):
    """Every byte is a token, and every tag of the template: no difference of texts is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=end)
    fast.add_tokens(list(dict.fromkeys([*TAG.findall(template), *extra_tokens])))
    fast.chat_template = template
    return fast


def make_teacher(folder, template, end, *, marks=None, **template_args):
    """A teacher of such a family, without weights."""
    make_tokenizer(template, end).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return TeacherTokenizer(ModelFiles(str(folder), None), template_args, marks)
