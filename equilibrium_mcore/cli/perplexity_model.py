"""Train the model of the filter `perplexity`: n-grams of characters, counted from JSONL.

The text should be like what you want to keep. The quantiles that are printed are of documents that
were held out of it: a max_perplexity at the 0.95 line would drop 5 in 100 of such documents.

Example:
    {prog} --input data/wiki.jsonl --output data/wiki.safetensors
    {try-filter} data/web.jsonl \\
        --filter type=perplexity,model=data/wiki.safetensors,max_perplexity=12
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the model, and how it is counted."""
    add = parser.add_argument
    add("--input", type=user_path, nargs="+", required=True, help="JSONL files, plain or .gz")
    add("--output", type=user_path, required=True, help="the model, .safetensors")
    add("--order", type=int, default=5, help="characters of the longest n-gram; default 5")
    add("--text-field", default="text", help="the key that holds the text; default text")
    add("--max-characters", type=int, default=50_000_000, help="then reading stops; default 5e7")
    add("--overwrite", action="store_true", help="replace an existing model")


def run(options: argparse.Namespace) -> None:
    """Train, print a summary."""
    from equilibrium_mcore.corpus.filters.train_perplexity import train_perplexity_model

    given = vars(options)
    done = train_perplexity_model(inputs=given.pop("input"), **given)
    print(
        f"{done.path}: {done.documents:,} documents, {done.characters:,} characters, "
        f"{done.ngrams:,} n-grams, {done.path.stat().st_size / 1e6:.1f} MB, {done.seconds:.1f} s"
    )
    for quantile, value in done.quantiles.items():
        print(f"  {quantile:4g} of {done.held_out} held-out documents: perplexity <= {value:.2f}")
