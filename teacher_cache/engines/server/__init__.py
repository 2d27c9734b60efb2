"""A teacher behind a vLLM server: each answer is checked before it is kept."""
