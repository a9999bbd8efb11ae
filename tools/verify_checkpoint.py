"""Verify checkpoints: every file against its hash, and what the small files say of the data."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("verify"))
