"""Certify that a run learns the same numbers in its layout as on one rank, without a GPU."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("certify"))
