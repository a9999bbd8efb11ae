"""Show what a run has read: documents, tokens and epochs per source, and the text of a step."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("ledger"))
