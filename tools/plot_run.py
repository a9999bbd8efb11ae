"""Draw a run's curves, or several runs over each other, into a PNG."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("plot"))
