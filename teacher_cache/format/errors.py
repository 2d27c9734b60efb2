"""What can be wrong with a cache.

CacheError
├── CacheFormatError     the bytes are wrong: damaged, cut off, or not of this format
├── CacheMismatchError   the bytes are right, but belong to something else
└── TraceNotFoundError   the cache has no trace of this id; a KeyError too
"""


class CacheError(Exception):
    """Anything about a cache that a user must mend; the message says where, what and how."""


class CacheFormatError(CacheError):
    """The bytes are wrong: damaged, cut off, or not of this format."""


class CacheMismatchError(CacheError):
    """The bytes are right, but belong to another capture, teacher, tokenizer or student."""


class TraceNotFoundError(CacheError, KeyError):
    """The cache has no trace of this id; the message names ids that are alike."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the message in quotes


def repair_advice(path: str) -> str:
    """What to do with a cache of which files are damaged or missing; no full stop at the end."""
    return (
        "restore these files from a copy, or take them out with "
        f"`cache-teacher verify {path} --repair` and capture their traces again"
    )
