"""The truncation protocol: cells that are runs, their figures, and a report on all of them."""
