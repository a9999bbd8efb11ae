"""Incremental decoding by the training modules: one token per row and step, in any layout."""
