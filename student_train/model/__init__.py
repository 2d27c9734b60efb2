"""The student as a model: loaded, prepared, run forward with its loss, saved."""
