"""Rounds on a student's own traces: rollouts, and the chain of commands that trains on them."""
