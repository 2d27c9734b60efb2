"""A student beside its teacher, token by token, as a page."""
