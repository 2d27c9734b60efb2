"""Checks that every engine shares, and their messages."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import EngineError, Sampling, TeacherRequest, TeacherRows
from teacher_cache.format import content_hash

# Steps of bfloat16 logits: 1/8 from 16 on, 1/1024 from 1/8 on. Smaller logits are few.
_COARSE_STEP = 2.0**-10
_STEP_TOLERANCE = 1 / 16  # of a step; float32 logprobs below 64 are exact to 1/250
_ROUNDED_SHARE = 0.9  # by chance 1/8 of them lie this close to a step
_FEWEST_GAPS = 64


def one_line(error: BaseException) -> str:
    """The message of a library's exception without line breaks or pydantic's appendix."""
    return " ".join(str(error).split()).split(" [type=")[0]


# Keys of a model's configuration that change no number.
_NO_NUMBERS = {"_name_or_path", "transformers_version", "id2label", "label2id", "problem_type"}


def settings_hash(settings: Mapping[str, object]) -> str:
    """Hash of a configuration, whatever the types of its values."""
    kept = {name: value for name, value in settings.items() if name not in _NO_NUMBERS}
    text = json.dumps(kept, sort_keys=True, default=lambda value: type(value).__name__)
    return content_hash(text)


def looks_rounded(logprobs: NDArray[np.float32]) -> bool:
    """Whether logprobs come from logits that were rounded to bfloat16 or float16.

    Differences of logprobs are differences of logits, and those of rounded ones are whole multiples
    of a step far wider than float32's, all of them.

    Args:
        logprobs: [R, K], one distribution per row, most probable first.
    """
    gaps = (logprobs[:, :1] - logprobs[:, 1:]).astype(np.float64).ravel()
    gaps = gaps[np.isfinite(gaps) & (gaps > _COARSE_STEP)]
    if len(gaps) < _FEWEST_GAPS:
        return False
    off = np.abs(gaps / _COARSE_STEP - np.round(gaps / _COARSE_STEP))
    return bool((off < _STEP_TOLERANCE).mean() > _ROUNDED_SHARE)


def check_model(model: str, revision: str | None) -> None:
    """Refuse a model that is neither a folder nor on the Hugging Face hub.

    Raises:
        EngineError: If there is none, it has no `config.json`, or the hub cannot be reached and
            there is no local copy.
    """
    folder, where = Path(model), f"model {model!r}"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EngineError(f"{where}: the folder holds no config.json")
        return
    if folder.exists() or folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise EngineError(f"{where}: no such folder, and not a valid name on the hub")
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{where}: no such folder, and the Hugging Face hub has none: {one_line(error)}"
        ) from error


def check_request(
    request: TeacherRequest, *, vocab_size: int, max_model_len: int, sampling: Sampling | None
) -> None:
    """Refuse a request that the engine could not finish, before any work is done for it.

    Args:
        request: Request to check.
        vocab_size: Width of the teacher's softmax; token ids lie below it.
        max_model_len: Largest number of tokens, given and generated.
        sampling: The engine's sampling settings; None if it can only score.

    Raises:
        EngineError: If it could not; names the request.
    """
    where, num_given = f"request {request.request_id!r}", len(request.token_ids)
    if num_given == 0:
        raise EngineError(f"{where}: no tokens")
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        raise EngineError(f"{where}: token ids are outside the teacher's 0 to {vocab_size - 1}")
    if not 0 <= request.seed < 2**63:  # vLLM takes -1 as "no seed", and 64 signed bits
        raise EngineError(f"{where}: expected a seed from 0 to 2**63 - 1, got {request.seed}")
    if request.max_new_tokens > 0 and sampling is None:
        raise EngineError(f"{where}: asks for new tokens of an engine made without `sampling`")
    if num_given + (request.max_new_tokens > 0) > max_model_len:
        what = "trace" if request.max_new_tokens == 0 else "prompt and one new token"
        raise EngineError(
            f"{where}: {what} of {num_given + (request.max_new_tokens > 0)} tokens, "
            f"the teacher's context holds {max_model_len}"
        )


def check_rows(rows: TeacherRows) -> None:
    """Refuse rows that do not belong to their tokens, or that contain NaN.

    Raises:
        EngineError: If rows of several requests were mixed up, or the model's numbers overflowed.
    """
    where, tokens = f"request {rows.request_id!r}", rows.token_ids[rows.first_row :]
    if rows.row_ids.shape != rows.row_logprobs.shape or len(rows.row_ids) != len(tokens):
        raise EngineError(
            f"{where}: expected rows for {len(tokens)} tokens, got ids {rows.row_ids.shape} "
            f"and logprobs {rows.row_logprobs.shape}"
        )
    if not np.array_equal(rows.row_ids[:, 0], tokens):
        wrong = rows.first_row + int(np.flatnonzero(rows.row_ids[:, 0] != tokens)[0])
        raise EngineError(f"{where}: the row of token {wrong} belongs to another token")
    if np.isnan(rows.row_logprobs).any():
        wrong = rows.first_row + int(np.flatnonzero(np.isnan(rows.row_logprobs).any(axis=1))[0])
        raise EngineError(
            f"{where}: the teacher's logprobs of token {wrong} are NaN; try another dtype"
        )
