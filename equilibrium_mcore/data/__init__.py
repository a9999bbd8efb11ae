"""Text to batches: tokenizers, indexed datasets, blends, the loader, n-gram baselines."""
