"""Distance of a student from the teacher on the traces of a cache."""

import torch

from student_train.model.forward import StudentWithLoss
from student_train.model.heldout import SectionFigures, heldout_figures
from student_train.model.load import check_student, head_of, load_model
from student_train.model.tokens import add_missing_tokens
from teacher_cache.format import Cache


def measure_on_cache(name: str, cache: Cache, device: torch.device) -> dict[str, SectionFigures]:
    """Figures of a model by section, on all of every trace of a cache.

    Raises:
        CacheError: If the cache cannot be read or does not fit the model.
    """
    model, tokenizer = load_model(name, dtype=torch.float32)
    add_missing_tokens(name, tokenizer, cache.header)
    check_student(name, model, tokenizer, cache.header)
    student = StudentWithLoss(model, head_of(model)).to(device).eval()
    return heldout_figures(student, cache, device)
