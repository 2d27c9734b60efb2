"""Full checks of a cache, and removal of damaged shards."""
