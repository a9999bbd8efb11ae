"""Which optimizer updates which parameter, and the layer-wise distributed optimizer."""
