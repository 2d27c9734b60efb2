"""Measurement, before training, of where in the traces a student has something to learn."""
