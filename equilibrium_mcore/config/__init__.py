"""Settings: plain values, their checks, how they are read. No torch, numpy or megatron."""
