"""Try filters on a sample of a JSONL file: what each would drop, and why, with examples."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("try-filter"))
