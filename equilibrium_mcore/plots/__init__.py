"""How every picture of the project looks, and how it is written."""
