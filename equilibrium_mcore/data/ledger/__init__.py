"""The order of the training data: per source a seeded order and a cursor, and a blend of them."""
