"""Add control tokens to a copy of a tokenizer: those that a chat template needs, or your own."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("add-tokens"))
