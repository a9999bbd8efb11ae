"""The hybrid model: layer specs for megatron-core's HybridModel, and the plain PyTorch modules."""
