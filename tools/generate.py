"""Talk with a model in the terminal: a checkpoint, a run, or an exported folder."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("generate"))
