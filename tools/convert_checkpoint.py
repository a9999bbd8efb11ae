"""Turn a distributed checkpoint, saved by any layout, into a Hugging Face folder."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("convert"))
