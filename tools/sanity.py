"""The checks that save a week: run them on a run's config before you train it."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("sanity"))
