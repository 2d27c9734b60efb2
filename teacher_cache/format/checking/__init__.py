"""A cache checked to the end, and damaged shards taken out of it."""
