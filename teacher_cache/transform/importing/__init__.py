"""`cache-teacher import`: rows that other programs wrote, as a cache; README.md is the guide."""
