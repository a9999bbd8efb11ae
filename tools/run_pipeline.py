"""Run a pipeline: steps that prepare, train, tune and export, each when its inputs have changed."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("pipeline"))
