"""Errors of a cache.

CacheError
├── CacheFormatError     the bytes are wrong: damaged, cut off, or not of this format
├── CacheMismatchError   the bytes are right, but belong to something else
└── TraceNotFoundError   the cache has no trace with this id; also a KeyError
"""


class CacheError(Exception):
    """A problem with a cache that a user must fix; the message says where, what and how."""


class CacheFormatError(CacheError):
    """The bytes are wrong: damaged, cut off, or not of this format."""


class CacheMismatchError(CacheError):
    """The bytes are right, but belong to another capture, teacher, tokenizer or student."""


class TraceNotFoundError(CacheError, KeyError):
    """The cache has no trace with this id; the message names similar ids."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the message in quotes


def repair_advice(path: str) -> str:
    """Advice for a cache with damaged or missing files, without a full stop at the end."""
    return (
        "restore these files from a copy, or remove them with "
        f"`cache-teacher verify {path} --repair` and capture their traces again"
    )
