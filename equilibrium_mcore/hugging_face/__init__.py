"""Megatron checkpoint to Hugging Face folder, by one declarative table."""
