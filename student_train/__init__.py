"""leadspan, stage two: train students on lead spans of a cached teacher's traces.

    from student_train import TrainConfig, train

    result = train(TrainConfig(cache=("cache",), student="student", out="run", lead_span=0.5))

- Whole runs: `train`, `evaluate` and `run_sweep`, each with its configuration and result; they do
  what the commands `train-student run`, `evaluate` and `sweep` do.
- A training loop of your own: `open_data` chooses the traces, `TokenSelection` the tokens,
  `DistillationDataset` streams batches of them (`collate_traces` makes them of rows, where a
  trainer has its own loader), and `sparse_kl` (or `sparse_kl_per_token`) is the
  loss under an `Objective`.
- Errors: `DivergedLossError`, `InterruptedRunError`, `NonFiniteLossError`, `OutOfMemoryError`, and
  those of `teacher_cache`.

Each name is loaded when it is first used: importing this package loads nothing else.
"""

TYPE_CHECKING = False  # as type checkers know it, without importing typing for it

if TYPE_CHECKING:
    from student_train.batch.micro_batch import MicroBatch
    from student_train.batch.torch_dataset import DistillationDataset
    from student_train.batch.trace_rows import collate_traces
    from student_train.data.stream import Cursor
    from student_train.data.tokens import TokenSelection
    from student_train.data.traces import TrainingData, open_data
    from student_train.errors import (
        DivergedLossError,
        InterruptedRunError,
        NonFiniteLossError,
        OutOfMemoryError,
    )
    from student_train.evaluation.config import EvaluateConfig
    from student_train.evaluation.evaluate import evaluate
    from student_train.evaluation.figures import Evaluation
    from student_train.losses import (
        Objective,
        SparseKLOutput,
        TeacherTargets,
        sparse_kl,
        sparse_kl_per_token,
    )
    from student_train.run.config import TrainConfig
    from student_train.run.finish import TrainResult
    from student_train.run.loop import train
    from student_train.sweep.config import SweepConfig
    from student_train.sweep.protocol import SweepResult, run_sweep

    __version__: str

__all__ = [
    "Cursor",
    "DistillationDataset",
    "DivergedLossError",
    "EvaluateConfig",
    "Evaluation",
    "InterruptedRunError",
    "MicroBatch",
    "NonFiniteLossError",
    "Objective",
    "OutOfMemoryError",
    "SparseKLOutput",
    "SweepConfig",
    "SweepResult",
    "TeacherTargets",
    "TokenSelection",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "__version__",
    "collate_traces",
    "evaluate",
    "open_data",
    "run_sweep",
    "sparse_kl",
    "sparse_kl_per_token",
    "train",
]

# Modules of the names that are not in student_train.losses.
_MODULES = {
    "Cursor": "student_train.data.stream",
    "DistillationDataset": "student_train.batch.torch_dataset",
    "DivergedLossError": "student_train.errors",
    "EvaluateConfig": "student_train.evaluation.config",
    "Evaluation": "student_train.evaluation.figures",
    "InterruptedRunError": "student_train.errors",
    "MicroBatch": "student_train.batch.micro_batch",
    "NonFiniteLossError": "student_train.errors",
    "OutOfMemoryError": "student_train.errors",
    "SweepConfig": "student_train.sweep.config",
    "SweepResult": "student_train.sweep.protocol",
    "TokenSelection": "student_train.data.tokens",
    "TrainConfig": "student_train.run.config",
    "TrainResult": "student_train.run.finish",
    "TrainingData": "student_train.data.traces",
    "collate_traces": "student_train.batch.trace_rows",
    "evaluate": "student_train.evaluation.evaluate",
    "open_data": "student_train.data.traces",
    "run_sweep": "student_train.sweep.protocol",
    "train": "student_train.run.loop",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.metadata import version

    if name == "__version__":
        value: object = version("leadspan")
    else:
        value = getattr(import_module(_MODULES.get(name, "student_train.losses")), name)
    globals()[name] = value  # not asked for again
    return value


def __dir__() -> list[str]:
    return __all__
