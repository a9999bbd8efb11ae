"""Processes of this machine: their cores and threads, their stacks, their end with their parent."""
