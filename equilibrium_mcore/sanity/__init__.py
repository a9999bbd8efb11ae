"""Checks of a run's config before it is trained: data, model, learning, in rising cost."""
