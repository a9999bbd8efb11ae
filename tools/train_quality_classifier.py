"""Train the classifier of the filter `educational` from good and bad documents."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("quality-classifier"))
