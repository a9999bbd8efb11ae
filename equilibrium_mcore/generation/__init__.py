"""New tokens from the training modules themselves, in the layout that they train in."""
