"""Trainable additions to a frozen model."""
