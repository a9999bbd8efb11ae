"""Prepare a mixture for training: read, filter, deduplicate, sample, split, tokenize."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("prepare"))
