"""Store what a teacher says of every sample of a run, so that the run loads no teacher."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("store-targets"))
