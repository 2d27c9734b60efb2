"""Teachers of a few tokens: tokenizers with a chat template, and a random model beside one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.sources.turn_layout import GivenMarks

GIVEN = GivenMarks("<think> ", " </think> ")


CHAT = (
    "{% for m in messages %}<start> {{ m.role }} {% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def make_teacher(folder, template):
    special = ["<end>", "<start>", "<think>", "</think>", "<unk>"]
    words = [*special, "user", "assistant", "system", *"abcdefghij", *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": special[1:4]})
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return TeacherTokenizer(ModelFiles(str(folder), None), {}, GIVEN)


MARKS = GivenMarks("<think>\n", "\n</think>\n\n")


TURNS = "{% for m in messages %}<|start|>{{ m.role }}\n{{ CONTENT }}<|end|>\n{% endfor %}"


GENERATE = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


LAST = "m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content"


TEMPLATES = {
    "plain": TURNS.replace("CONTENT", "m.content") + GENERATE,
    # As DeepSeek-R1's: earlier thinking goes, and the generation prompt opens the next.
    "opening": TURNS.replace("CONTENT", LAST)
    + GENERATE.replace("assistant\n", "assistant\n<think>\n"),
    # As Qwen3's: reasoning that stands apart is known, and kept after the last question only.
    "stripping": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.index0 > ns.last %}"
        "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        f"{{{{ {LAST} }}}}<|end|>\n{{% endfor %}}" + GENERATE
    ),
}


def make_byte_teacher(folder, template, marks=MARKS, **template_args):
    """Every byte is a token, so that no difference between two texts is lost."""
    texts = [m.strip() for m in (marks.opener, marks.joint)] if marks else ["<think>", "</think>"]
    special = ["<|end|>", "<|start|>", *texts]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return TeacherTokenizer(ModelFiles(str(folder), None), template_args, marks)


def rendered(teacher, messages):
    return teacher.template.render(messages)


def says(role, content, **more):
    return {"role": role, "content": content, **more}


CONTEXT = 128


def make_small_model(folder):
    """A random Qwen3 with the tokenizer of the source tests."""
    import torch

    make_teacher(folder, CHAT)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
