"""From finished traces to sealed shards, through a journal that survives a kill."""
