"""Print how many parameters a model has, and how many work on one token, by layer kind."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("count"))
