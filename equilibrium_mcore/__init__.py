"""Equilibrium mcore: 3D-parallel training of hybrid Mamba-2 + MLA + MoE models on Megatron-Core."""

__version__ = "0.1.0"
