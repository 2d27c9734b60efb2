"""From bytes to traces: all that a student's training needs of the format."""
