"""The student as a model: load, prepare, run forward with its loss, save."""
