"""The sections of a trace in words, for readers who have not seen the code."""

SECTION_NAMES = {"prompt": "prompt", "cot": "chain of thought", "answer": "answer"}
