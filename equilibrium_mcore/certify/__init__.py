"""Proofs about a run before it is trained: the certificate of layouts, and the sanity ladder."""
