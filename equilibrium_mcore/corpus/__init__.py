"""Text to datasets, before any run: preprocessing, filters, mixtures, tokenizers."""
