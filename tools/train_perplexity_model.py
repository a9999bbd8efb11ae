"""Train the model of the filter `perplexity`: n-grams of characters, counted from JSONL."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("perplexity-model"))
