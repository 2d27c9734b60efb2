"""What a student can do: prompts in, completions checked, shares with their intervals."""
