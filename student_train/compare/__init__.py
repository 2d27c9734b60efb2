"""Finished or running runs beside each other, as a page."""
