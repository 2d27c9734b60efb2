"""What can be set for an evaluation, checked without loading torch."""

from dataclasses import dataclass
from pathlib import Path

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation by generation. Command-line options mirror these fields."""

    model: str
    prompts: Path
    cache: str | None = None
    engine: str = "transformers"
    samples: int = 1
    max_tokens: int = 512
    batch_size: int = 32
    limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    think_close: str = "</think>"
    group_by: str | None = None
    completions: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "limit", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected {' or '.join(ENGINES)}, got {self.engine!r}")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if self.samples > 1 and self.temperature == 0.0:
            raise ValueError(
                f"samples: {self.samples} at temperature 0 would be the same; give --temperature"
            )
