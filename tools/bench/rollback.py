"""Show that a rollback is the run that was told from the start to leave the bad samples out.

A small run on real text is trained twice on the CPU. In the first the output weights are wrong for
one step, as by a damaged batch: its loss spikes, the run goes back to its last good checkpoint and
passes over the samples of that step and of some before it. The second has these samples in
`training.left_out` from the start, and no fault. Loss and gradient norm of every step must be equal
to the bit; the status is 1 when they are not.

Example:
    python tools/bench/rollback.py --output docs/images/rollback.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.config.load import load_run_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics
from tools.bench.curve import ROOT, make_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tools.bench.measure.rollback import Seen

COMPARED = ("loss", "aux_loss", "gradient_norm", "learning_rate", "tokens")
STEPS, BAD_STEP, MARGIN = 44, 27, 4
TWO_RANKS = (
    f"training.steps={STEPS}",
    "checkpoint.save_interval_steps=10",
    "checkpoint.asynchronous=true",
    "parallelism.world_size=2",
    "training.micro_batch_size=4",
    f"training.anomalies.margin_steps={MARGIN}",
    "training.anomalies.policy=rollback",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the picture goes."""
    parser.add_argument("--output", type=user_path, metavar="PNG", help="draw both curves")


def run(options: argparse.Namespace) -> int:
    """Train twice, compare, draw; 1 where the curves differ."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    with tempfile.TemporaryDirectory(prefix="rollback_") as temporary:
        folder = Path(temporary)
        settings = [*make_data(ROOT, folder), *TWO_RANKS]
        spiking = _config(folder / "spiking", settings)
        size = spiking.training.global_batch_size
        seen = _train(spiking, (BAD_STEP - 1) * size)
        left_out = [[(BAD_STEP - 1 - MARGIN) * size, (1 + MARGIN) * size]]
        without = _config(folder / "without", [*settings, f"training.left_out={left_out}"])
        _train(without, None)
        curves = _records(folder / "spiking"), _records(folder / "without")
    if options.output is not None:
        _picture(options.output, seen, *curves)
    return _verdict(seen, *curves)


def _config(output: Path, settings: list[str]) -> RunConfig:
    quickstart = ROOT / "configs" / "runs" / "quickstart.yaml"
    return load_run_config([str(quickstart), f"output_directory={output}", *settings])


def _train(config: RunConfig, bad_position: int | None) -> Seen:
    from equilibrium_mcore.parallel.rank_server import RankServer
    from tools.bench.measure.rollback import train_rank

    work = partial(train_rank, config=config, bad_position=bad_position)
    with RankServer() as server:
        return server.run(config.parallelism.world_size, work)[0]


def _records(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder / METRICS_FILE) if record["kind"] == "train"]


def _verdict(seen: Seen, found: list[dict], expected: list[dict]) -> int:
    print(f"spikes (step, loss): {seen.spikes}; the run went back to steps {seen.back_to}")
    apart = [
        f"step {old['step']}: {name} {new[name]!r}, without the samples {old[name]!r}"
        for old, new in zip(expected, found, strict=True)
        for name in COMPARED
        if new[name] != old[name]
    ]
    if apart or [step for step, _ in seen.spikes] != [BAD_STEP]:
        print(f"NOT the same run: {len(apart)} numbers differ: {'; '.join(apart[:3])}")
        return 1
    print(f"{len(found)} steps equal to the bit: {', '.join(COMPARED)}")
    return 0


def _picture(path: Path, seen: Seen, found: list[dict], expected: list[dict]) -> None:
    from equilibrium_mcore.plots.figure import write_png

    print(write_png(path, partial(_draw, seen, found, expected), dpi=110))


def _draw(seen: Seen, found: list[dict], expected: list[dict]) -> Figure:
    import matplotlib.pyplot as plt

    from equilibrium_mcore.plots.figure import INK, colour_of

    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    spike, (back_to, *_) = seen.spikes[0], seen.back_to
    losses = {record["step"]: record["loss"] for record in found}
    first = seen.losses[: spike[0] - 1]
    discarded = [point for point in first if point[0] >= back_to] + [spike]
    without = {record["step"]: record["loss"] for record in expected}
    axes.plot(without.keys(), without.values(), color=colour_of(5), lw=6, alpha=0.5)
    axes.plot(losses.keys(), losses.values(), color=colour_of(0), lw=1.5)
    axes.plot(*zip(*discarded, strict=True), color=colour_of(1), ls="--", lw=1.5)
    axes.plot(*spike, marker="X", ms=9, color=colour_of(1), ls="none")
    axes.annotate(
        "",
        xy=(back_to, losses[back_to]),
        xytext=spike,
        arrowprops={
            "arrowstyle": "-|>",
            "color": INK,
            "connectionstyle": "arc3,rad=0.3",
            "shrinkA": 8,
        },
    )
    labels = (
        "told from the start to leave these samples out",
        "after the rollback",
        "trained, then discarded",
        f"spike at step {spike[0]}: nothing is updated",
    )
    figure.legend(axes.lines, labels, loc="outside lower center", ncols=2)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=_title(spike[0], back_to))
    return figure


def _title(spike: int, back_to: int) -> str:
    return f"Back to step {back_to}, without the samples of steps {spike - MARGIN} to {spike}"


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
