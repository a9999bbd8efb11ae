"""What tools/analyze_mixture.py does: an analysis, with the time and cost of training on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.corpus.mixtures.analyze import MixtureAnalysis, analyze, expected
from equilibrium_mcore.corpus.mixtures.report import csv_text, json_text, markdown
from equilibrium_mcore.files.paths import expand_path
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.planning.training_cost import Cluster, TrainingCost, training_cost


def mixture_report(
    subject: str,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    model: str | None = None,
    gpus: int = 8,
    peak_tflops: float | None = None,
    mfu: float = 0.4,
    price: float | None = None,
) -> str:
    """The report as Markdown; with `output`, also its files there.

    `subject` is a prepared folder, or a mixture (a file, or a name in configs/data), of which
    only the expected figures are known. With `model`, time and cost of training it on the mixture's
    tokens are estimated. Raises ConfigError, OSError and ValueError.
    """
    folder = expand_path(subject)
    if folder.is_dir():
        if overrides:
            raise ValueError(
                f"{', '.join(overrides)}: {folder} is prepared, and its settings are those of its "
                f"manifest; analyze the mixture's file instead"
            )
        analysis = analyze(folder, say=lambda text: print(text, file=sys.stderr))
    else:
        analysis = expected(load_mixture(subject, overrides))
    cost = None if model is None else _cost(analysis, model, gpus, peak_tflops, mfu, price)
    lines = cost.lines() if cost else []
    if output is None:
        return markdown(analysis, cost=lines)
    # Imported here: it takes a second, and only pictures need it.
    from equilibrium_mcore.corpus.mixtures.pictures import draw

    output.mkdir(parents=True, exist_ok=True)
    text = markdown(analysis, cost=lines, pictures=draw(analysis, output))
    write_whole(output / "report.json", json_text(analysis, cost=cost.values() if cost else None))
    write_whole(output / "datasets.csv", csv_text(analysis))
    write_whole(output / "report.md", text)
    return text


def _cost(
    analysis: MixtureAnalysis,
    model: str,
    gpus: int,
    peak_tflops: float | None,
    mfu: float,
    price: float | None,
) -> TrainingCost:
    if analysis.unit != "tokens" or analysis.total is None:
        raise ValueError(
            f"--model {model}: the phase {analysis.phase} counts {analysis.unit}; time and cost "
            f"are estimated for phases that train on tokens"
        )
    if peak_tflops is None:
        raise ValueError(
            f"--model {model}: give the dense peak of one GPU with --peak-tflops, e.g. 989 for an "
            f"H100 SXM in bf16"
        )
    cluster = Cluster(gpus, peak_tflops, mfu, price)
    return training_cost(
        load_model(model),
        tokens=analysis.total,
        sequence_length=analysis.sequence_length,
        cluster=cluster,
    )
