"""A cache for a student with another tokenizer."""
