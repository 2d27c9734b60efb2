"""Checks of train-student before torch is imported: an error takes half a second, not ten."""

from itertools import islice
from pathlib import Path

from student_train.data.where import Where
from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.prompts import read_prompts
from student_train.profile.config import ProfileConfig
from student_train.rounds.config import RoundsConfig
from student_train.rounds.rollout_config import RolloutConfig
from student_train.rounds.rows import read_questions
from student_train.run.config import TrainConfig
from student_train.run.folder import RunFolder, student_of
from student_train.sweep.config import SweepConfig
from student_train.view.config import StudentViewConfig
from teacher_cache.format.folder_lock import LOCK_NAME, FolderLock
from teacher_cache.sources.files import Input
from teacher_cache.terminal.early_checks import (
    check_cache,
    check_file,
    check_hub_name,
    check_model,
    check_out_file,
    check_out_folder,
    check_wandb_login,
    near_path,
)
from teacher_cache.terminal.launched import is_first_process


def check_run(config: TrainConfig) -> None:
    """Check the paths and names of a run.

    Raises:
        ValueError: If one is wrong, with the option, the expected and the found value.
        InUseError: If another run is at work in its folder.
        OSError: If the disk is full.
    """
    if config.where is not None:
        Where.parse(config.where)
    for cache in config.cache:
        check_cache(cache, "--cache")
    if config.heldout_cache is not None:
        check_cache(config.heldout_cache, "--heldout-cache")
    if config.trace_fields is not None:
        check_file(config.trace_fields, "--trace-fields")
    check_model(config.student, "--student")
    if config.live_teacher is not None:
        check_model(config.live_teacher, "--live-teacher")
    check_out_folder(config.out)
    RunFolder(config.out).check_settings(config)
    _check_unused(config.out)
    if config.tracker == "wandb":
        check_wandb_login()


def _check_unused(folder: Path) -> None:
    """Refuse a folder in which another run is at work; of several processes, the first looks."""
    lock = folder / LOCK_NAME
    if lock.exists() and is_first_process():
        FolderLock(lock).close()  # what a dead process has left


def check_profile(config: ProfileConfig) -> None:
    """Check the paths and names of a profile; raises as `check_run`."""
    for cache in config.cache:
        check_cache(cache, "--cache")
    if config.trace_fields is not None:
        check_file(config.trace_fields, "--trace-fields")
    check_model(config.student, "--student")
    check_out_folder(config.out)


def check_view(config: StudentViewConfig) -> None:
    """Check the paths and names of a view; raises as `check_run`."""
    check_cache(config.cache)
    check_model(student_of(config.student), "--student")
    check_out_file(config.out, "--out", force=config.force)


def check_evaluate(config: EvaluateConfig) -> None:
    """Check the paths and names of an evaluation, and all its prompts; raises as `check_run`."""
    check_model(config.model, "--model")
    if config.cache is not None:
        check_cache(config.cache, "--cache")
    if config.completions is not None:
        check_out_file(config.completions, "--completions", force=True)
    _check_prompts(config.prompts, "--prompts")
    for _ in islice(read_prompts(config.prompts, config.group_by), config.limit):
        pass  # reading is checking


def check_rollout(config: RolloutConfig) -> None:
    """Check the paths and names of a rollout, and all its prompts; raises as `check_run`."""
    check_model(config.model, "--model")
    check_out_file(config.out, "--out", force=True)
    _check_prompts(config.prompts, "--prompts")
    read_questions(config)  # reading is checking


def check_rounds(config: RoundsConfig) -> None:
    """Check the paths and names of rounds; raises as `check_run`."""
    check_model(config.student, "--student")
    for teacher in config.teacher:
        check_model(teacher, "--teacher")
    if config.cache is not None:
        check_cache(config.cache, "--cache")
    check_out_folder(config.out)
    _check_prompts(config.prompts, "--prompts")
    if config.eval_prompts is not None:
        _check_prompts(config.eval_prompts, "--eval-prompts")


def check_sweep(config: SweepConfig) -> None:
    """Check the paths and names of a sweep, and all its prompts; raises as `check_run`."""
    check_cache(config.cache, "--cache")
    if config.heldout_cache is not None:
        check_cache(config.heldout_cache, "--heldout-cache")
    check_model(config.student, "--student")
    check_out_folder(config.out)
    _check_prompts(config.eval_prompts, "--eval-prompts")
    for _ in read_prompts(config.eval_prompts, config.eval_options.get("group_by")):
        pass


def _check_prompts(path: Path, flag: str) -> None:
    rows = Input(path)
    rows.check_exists(near_path(path))
    if rows.may_be_hub_id:
        check_hub_name(str(path), flag, "datasets")
