"""Report on a mixture: shares, lengths, tokens, duplicates, what was dropped; time and cost."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("analyze"))
