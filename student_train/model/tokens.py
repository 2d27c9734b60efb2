"""The student's tokenizer against the cache's: missing marks, chat template, special tokens.

A student that learns from traces in one template is useless in another, at the same loss: the
template in its folder must be the one that it was trained on.
"""

import logging

from transformers import AddedToken, PreTrainedTokenizerBase

from teacher_cache.format import CacheHeader

logger = logging.getLogger(__name__)

_NUM_SHOWN = 8  # tokens


def add_missing_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, header: CacheHeader
) -> list[str]:
    """Give a tokenizer the teacher's added tokens that it lacks, under the teacher's ids.

    Base models of a family often have rows for marks (`<think>`) that their tokenizer lacks. Only
    tokens whose ids directly follow the tokenizer's own are added; `check_student` then decides
    whether it is the teacher's.

    Args:
        name: Name of the student, for messages.
        tokenizer: Tokenizer of the student; changed in place.
        header: Header of the cache.

    Returns:
        The tokens that were added.
    """
    known = tokenizer.get_vocab()
    missing = [
        (int(facts["id"]), text, bool(facts["special"]))
        for text, facts in (header.added_tokens or {}).items()
        if text not in known
    ]
    added = []
    for token_id, text, special in sorted(missing):
        if token_id != len(tokenizer):
            break
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
        added.append(text)
    if added:
        shown = ", ".join(added[:_NUM_SHOWN]) + (", ..." if len(added) > _NUM_SHOWN else "")
        logger.warning(
            "%s: its tokenizer lacked %d tokens of the teacher's, which were added: %s",
            name, len(added), shown,
        )  # fmt: skip
    return added


def adopt_turns(name: str, tokenizer: PreTrainedTokenizerBase, header: CacheHeader) -> None:
    """Give a student's tokenizer the chat template and special tokens of a cache's traces.

    Differences from the student's own are reported. A cache of a teacher without a template leaves
    the student's as it is.

    Args:
        name: Name of the student, for messages.
        tokenizer: Tokenizer of the student; changed in place.
        header: Header of the cache.
    """
    for line in differences(tokenizer, header):
        logger.warning("%s: %s: RUN/model gets the cache's (--chat-template)", name, line)
    if header.chat_template is not None:
        template = header.chat_template
        tokenizer.chat_template = template if isinstance(template, str) else dict(template)
    for part, text in _of_turns(header).items():
        setattr(tokenizer, part, text)


def differences(tokenizer: PreTrainedTokenizerBase, header: CacheHeader) -> list[str]:
    """Describe differences of template and special tokens between student and cache."""
    found = []
    own = tokenizer.chat_template
    if header.chat_template is not None and own != header.chat_template:
        found.append(
            "its chat template is not the one that the traces were rendered with"
            if own
            else "it has no chat template"
        )
    for part, text in _of_turns(header).items():
        mine = getattr(tokenizer, part, None)
        if mine != text:
            found.append(f"its {part} is {mine!r}, the teacher's {text!r}")
    return found


def _of_turns(header: CacheHeader) -> dict[str, str]:
    """Special tokens that begin and end sequences; padding is left to the student."""
    special = header.special_tokens or {}
    return {part: special[part] for part in ("bos_token", "eos_token") if part in special}
