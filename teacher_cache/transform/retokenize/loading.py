"""Loads both tokenizers, and makes the header of a cache in the student's tokens."""

from dataclasses import replace

from teacher_cache.format import Cache, CacheHeader, CacheMismatchError
from teacher_cache.sources import PromptRenderer, RowColumns
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.sources.turn_layout import GivenMarks
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.convert import Converter
from teacher_cache.transform.retokenize.rows import MAX_VOCABULARY
from teacher_cache.transform.retokenize.vocabularies import share_vocabularies

_NO_LIMIT = 1 << 31  # on a prompt: the response exists, whatever the student's context


def _student_files(config: RetokenizeConfig) -> ModelFiles:
    return ModelFiles(config.student, config.student_revision)


def _student_chat(config: RetokenizeConfig) -> TeacherTokenizer:
    marks = None
    if config.think_open is not None and config.think_close is not None:
        opener, joint = (m.replace("\\n", "\n") for m in (config.think_open, config.think_close))
        marks = GivenMarks(opener, joint)
    return TeacherTokenizer(_student_files(config), config.template_arg, marks)


def student_header(config: RetokenizeConfig, source: Cache) -> CacheHeader:
    """The source's header, with all facts about tokens replaced by the student's."""
    files, chat = _student_files(config), _student_chat(config)
    before = source.header
    if before.derived is not None:
        raise CacheMismatchError(
            f"{source.path}: was itself carried over from another tokenizer; start from the cache "
            f"it was made from ({before.derived.get('fingerprint')})"
        )
    layout = chat.layout()
    mark_ids = (
        ((), ())
        if layout.marks is None
        else tuple(tuple(chat.encode(mark)) for mark in (layout.marks.open, layout.marks.close))
    )
    return replace(
        before,
        vocab_size=max(files.vocab_size(), chat.size),
        tokenizer_size=chat.size,
        tokenizer_fingerprint=chat.fingerprint,
        chat_template_hash=chat.template_hash,
        think_open_ids=mark_ids[0],
        think_close_ids=mark_ids[1],
        terminal_token_ids=chat.terminal_ids,
        capture_prompt=False,
        chat_template=chat.template.text,
        chat_template_args=chat.template.arguments or None,
        special_tokens=chat.special_tokens or None,
        added_tokens=chat.added_tokens or None,
        turn_layout=layout.to_json(),
        derived={
            "fingerprint": source.fingerprint,
            "tokenizer_fingerprint": before.tokenizer_fingerprint,
            "vocab_size": before.vocab_size,
            "student": files.name,
            "chunks": True,
        },
        rollout=None,  # whose logprobs are of its own tokens
    )


def make_converter(config: RetokenizeConfig, source: CacheHeader) -> Converter:
    """Load both tokenizers.

    Args:
        config: Configuration that names them.
        source: Header of the teacher's cache.

    Raises:
        CacheMismatchError: If the teacher's tokenizer differs from the cache's.
        UnsupportedTokenizerError: If one of them cannot be carried over.
    """
    where = config.teacher or source.teacher
    files = ModelFiles(where, source.teacher_revision if config.teacher is None else None)
    own = TeacherTokenizer(files, {})
    if own.fingerprint != source.tokenizer_fingerprint:
        raise CacheMismatchError(
            f"teacher {where!r}: its tokenizer is not the one of the capture; name the "
            "folder of the right one with --teacher"
        )
    teacher = ByteTokenizer(own.definition, f"teacher {where!r}")
    chat = _student_chat(config)
    student = ByteTokenizer(chat.definition, f"student {config.student!r}")
    vocab_size = max(_student_files(config).vocab_size(), chat.size)
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"student: at most {MAX_VOCABULARY:,} ids, got {vocab_size:,}")
    columns = RowColumns(
        id_field=config.id_field,
        prompt_field=config.prompt_field,
        drop_system=config.drop_system,
        apply_chat_template=config.apply_chat_template,
    )
    render = PromptRenderer(chat, _NO_LIMIT, vocab_size, columns)
    words = share_vocabularies(teacher, source, student, chat)
    return Converter(source, teacher, student, words, chat, render)
