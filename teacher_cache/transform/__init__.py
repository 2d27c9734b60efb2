"""A cache in, data out: truncated caches and exports."""
