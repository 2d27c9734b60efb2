"""Captures: configurations, the survey of the input, the worker loop, Ray."""
