"""Datasets to batches: indexed files, blends, the ledger, conversations, the loader."""
