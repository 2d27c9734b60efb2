"""leadspan, stage one: capture a reasoning model's top-k logits, and read them back.

    from teacher_cache import open_cache

    cache = open_cache("cache")
    print(cache, cache["some-id"].logprobs(12))

- Reading: `open_cache` gives a `Cache`: `len(cache)`, `for trace in cache`, `cache[trace_id]`,
  `cache.infos`. A `Trace` has `logprobs(t)`, `tail`, `section(t)` and slices `trace[:n]`.
- Capturing: `generate(GenerateConfig(...))` lets the teacher answer prompts,
  `score(ScoreConfig(...))` takes traces that exist already; both return a `CaptureReport`.
- Errors: a `CacheError` says what is wrong with a cache, a `SourceError` with an input, an
  `EngineError` with the engine.

Each name is loaded when it is first used: importing this package loads nothing else.
"""

TYPE_CHECKING = False  # as type checkers know it, without importing typing for it

if TYPE_CHECKING:
    from teacher_cache.capture.configs import GenerateConfig, ScoreConfig
    from teacher_cache.capture.generate import generate
    from teacher_cache.capture.run import CaptureReport
    from teacher_cache.capture.score import score
    from teacher_cache.engines import EngineError
    from teacher_cache.format import (
        Cache,
        CacheError,
        CacheFormatError,
        CacheHeader,
        CacheMismatchError,
        TokenLogprobs,
        Trace,
        TraceInfo,
        TraceNotFoundError,
        open_cache,
    )
    from teacher_cache.sources import SourceError

    __version__: str

__all__ = [
    "Cache",
    "CacheError",
    "CacheFormatError",
    "CacheHeader",
    "CacheMismatchError",
    "CaptureReport",
    "EngineError",
    "GenerateConfig",
    "ScoreConfig",
    "SourceError",
    "TokenLogprobs",
    "Trace",
    "TraceInfo",
    "TraceNotFoundError",
    "__version__",
    "generate",
    "open_cache",
    "score",
]

# Where the names stand that are not in teacher_cache.format.
_MODULES = {
    "CaptureReport": "teacher_cache.capture.run",
    "EngineError": "teacher_cache.engines",
    "GenerateConfig": "teacher_cache.capture.configs",
    "ScoreConfig": "teacher_cache.capture.configs",
    "SourceError": "teacher_cache.sources",
    "generate": "teacher_cache.capture.generate",
    "score": "teacher_cache.capture.score",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.metadata import version

    if name == "__version__":
        value: object = version("leadspan")
    else:
        value = getattr(import_module(_MODULES.get(name, "teacher_cache.format")), name)
    globals()[name] = value  # not asked for again
    return value


def __dir__() -> list[str]:
    return __all__
