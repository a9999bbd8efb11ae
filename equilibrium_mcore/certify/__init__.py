"""Checks of a run before it costs anything."""
