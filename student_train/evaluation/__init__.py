"""Evaluation of a student: prompts in, completions checked, shares with their intervals."""
