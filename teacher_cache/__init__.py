"""Stage one: run the teacher once and keep what it said, as a cache of Arrow shards."""
