"""Train a SentencePiece tokenizer on JSONL text: BPE, byte fallback, exact round trip.

Example:
    python tools/train_tokenizer.py --input code.jsonl prose.jsonl \\
        --output runs/quickstart/tokenizer/tokenizer.model --vocab-size 4096
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.corpus.train_tokenizer import CHAT_TOKENS, train_tokenizer
from equilibrium_mcore.files.paths import user_path


def main() -> int:
    """Parse the command line, train, print a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=user_path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--output", type=user_path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--json-key", default="text", help="the field that holds the text")
    parser.add_argument("--max-megabytes", type=float, default=10.0, help="how much text to sample")
    parser.add_argument(
        "--special-tokens", nargs="*", default=CHAT_TOKENS, help="control tokens to reserve"
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    arguments = parser.parse_args()
    print(f"training a vocabulary of {arguments.vocab_size} ...", file=sys.stderr, flush=True)
    try:
        summary = train_tokenizer(
            inputs=arguments.input,
            output=arguments.output,
            **{k: v for k, v in vars(arguments).items() if k not in ("input", "output")},
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{summary.path}: {summary.vocab_size} tokens from {summary.trained_bytes / 1e6:.1f} MB in "
        f"{summary.seconds:.1f} s; {summary.bytes_per_token:.2f} bytes per token on "
        f"{summary.held_out_bytes / 1e6:.2f} MB held out"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
