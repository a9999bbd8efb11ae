"""Sharded checkpoints: saved whole or not at all, loaded in any layout."""
