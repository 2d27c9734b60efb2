"""From bytes to traces: the part of the format that training a student needs."""
