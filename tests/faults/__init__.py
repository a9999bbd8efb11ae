"""Accidents of real runs, made to happen on purpose: `python -m tests.faults --help`."""
