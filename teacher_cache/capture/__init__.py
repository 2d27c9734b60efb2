"""The capture job: configurations, the survey of the input, the worker loop, Ray."""
