"""One training run: its configuration, its loop, its folder and checkpoints."""
