"""Train: a stage, a model and a mixture by their names, in a folder that holds all of the run."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("train"))
