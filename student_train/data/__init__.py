"""The choice of traces and tokens to train on, and their order. No torch here."""
