"""Which scored requests may read vLLM's prefix cache, where the responses of a prompt meet.

Tokens found there are not computed: they have no rows. Before the first token that needs one this
saves time; one block further, rows would be missing, and a cache may reach further wherever two
responses begin alike.
"""

from teacher_cache.engines import TeacherRequest

_MOST_SEEN = 1 << 17  # by then an engine has long forgotten the first


class SharedPrompts:
    """The beginnings of the traces scored so far, as far as they matter."""

    def __init__(self, block_tokens: int) -> None:
        """Take the size of the cache's blocks, which are found whole or not at all."""
        self._block_tokens = block_tokens
        self._seen: set[int] = set()

    def may_read(self, request: TeacherRequest) -> bool:
        """Whether the cache holds no token whose row is wanted, as far as is known here.

        The engine may also have its blocks from elsewhere; `is_too_far` tells of what it found.
        """
        block, ids = self._block_tokens, request.token_ids
        # The row of a token comes from the one before it, which must be computed.
        end = -(-request.first_row // block) * block
        if len(ids) < end:  # no whole block reaches into the rows
            return request.first_row > block
        key = hash(ids[:end])
        is_new = key not in self._seen
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return is_new and request.first_row > block


def is_too_far(request: TeacherRequest, num_cached_tokens: int) -> bool:
    """Whether the engine found so many of a request's tokens in its cache that rows are missing."""
    return num_cached_tokens >= request.first_row
