"""Runs by name: started from templates, resumed from their folder, chained as a pipeline."""
