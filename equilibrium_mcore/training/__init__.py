"""Setup, the training step, the loop and what happens along it."""
