"""One training run: its configuration, loop, folder and checkpoints."""
