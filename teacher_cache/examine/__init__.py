"""A cache in, figures out: inspection, audit, and the plan of a capture."""
