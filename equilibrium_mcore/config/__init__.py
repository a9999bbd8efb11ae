"""Settings: plain values, their checks, and how they are read. Imports no torch, numpy, megatron."""
