"""Merge datasets into one, one after the other; their files stay as they are."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("merge"))
