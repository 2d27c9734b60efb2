"""Traces become tensors: micro-batches, packed rows, dense targets."""
