"""What each stage does in its ranks; no stage imports another."""
