"""Train a SentencePiece tokenizer on JSONL text: BPE, byte fallback, exact round trip."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("tokenizer"))
