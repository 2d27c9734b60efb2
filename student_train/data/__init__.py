"""Which traces and which of their tokens are trained on, and in what order. No torch here."""
