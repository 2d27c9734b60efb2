"""The truncation protocol: cells that are runs, their figures, and the report of all of them."""
