"""Losses as pure functions of tensors: no process group, no model, no config."""
