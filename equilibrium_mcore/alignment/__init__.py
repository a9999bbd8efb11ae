"""What training did to how a model answers: two models side by side on the same prompts."""
