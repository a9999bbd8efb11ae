"""Accelerator, process groups and the launch of ranks."""
