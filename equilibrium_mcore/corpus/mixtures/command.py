"""What tools/prepare_dataset.py does: a mixture by name, its changes, and the summary in words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.corpus.mixtures.manifest import MixtureManifest
from equilibrium_mcore.corpus.mixtures.plan import make_plan, open_sources
from equilibrium_mcore.corpus.mixtures.prepare import Options, prepare


def run(
    mixture: str,
    overrides: Sequence[str],
    *,
    output: Path,
    dry_run: bool = False,
    sample: int | None = None,
    local: Sequence[str] = (),
    total_tokens: str | None = None,
    temperature: float | None = None,
    tokenizer_type: str | None = None,
    tokenizer_model: Path | None = None,
    **options,
) -> str:
    """Prepare (or only plan, with `dry_run`) and return the text to print.

    Raises ConfigError, OSError, ValueError and ImportError; see `prepare`.
    """
    changes = [*overrides, *_changes(total_tokens, tokenizer_type, tokenizer_model)]
    config = load_mixture(mixture, changes, local=local, temperature=temperature)
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}: at least 1 row is needed")
    if dry_run:
        plan = open_sources(
            make_plan(config),
            ask_hub=False,
            skip_bad_rows=bool(options.get("skip_bad_rows")),
        )
        note = _hub_note(config, [s.dataset.name for s in plan.sources if s.hub])
        return f"{plan.text()}\n{note}nothing was prepared (--dry-run)"
    manifest = prepare(
        config,
        Options(output=output, sample_rows=sample, **options),
        say=lambda text: print(text, file=sys.stderr),
    )
    return summary(manifest, output)


def parse_count(text: str, *, option: str) -> int:
    """`2e9`, `2_000_000_000`, `2B`, `500M` or `10K` as a whole number."""
    factors = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    digits, factor = text.replace(",", ""), 1
    if digits[-1:].upper() in factors:
        factor, digits = factors[digits[-1].upper()], digits[:-1]
    try:
        count = round(float(digits) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"{option} {text}: give a number above 0, e.g. 2e9, 2_000_000 or 500M")
    return count


def summary(manifest: MixtureManifest, output: Path) -> str:
    """Per dataset what came in, stayed and was held out; then where it is."""
    unit = "tokens" if manifest.kind == "text" else "examples"
    lines = []
    for source in manifest.datasets:
        gone = sum(source.dropped.values()) + source.empty + source.bad
        epochs = f", {source.epochs:.2f} epochs of {source.max_epochs:g}" if source.epochs else ""
        lines.append(
            f"{source.name}: {source.rows:,} rows read, {gone:,} dropped, {source.documents:,} "
            f"documents with {source.tokens:,} {unit}, of them {source.validation_tokens:,} held "
            f"out{epochs}"
        )
        most = sorted(source.dropped.items(), key=lambda item: -item[1])[:4]
        lines += [f"    {reason}: {count:,}" for reason, count in most]
    lines += [f"train with data: {output / name}" for name in manifest.blends]
    return "\n".join(lines)


def _changes(
    total_tokens: str | None, tokenizer_type: str | None, tokenizer_model: Path | None
) -> list[str]:
    changes = []
    if total_tokens is not None:
        count = parse_count(total_tokens, option="--total-tokens")
        changes.append(f"metadata.total_tokens={count}")
    if tokenizer_type is not None:
        changes.append(f"tokenizer.type={tokenizer_type}")
    if tokenizer_model is not None:
        changes.append(f"tokenizer.model={tokenizer_model}")
    return changes


def _hub_note(config: MixtureConfig, names: list[str]) -> str:
    if not names:
        return ""
    return f"on the Hub, and not asked: {', '.join(names)}\n"
