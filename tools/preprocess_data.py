"""Tokenize JSONL text into Megatron's .bin/.idx, with Megatron-LM's option names."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("preprocess"))
