"""Document filters: what stays in a corpus, and what is taken out of its text."""
