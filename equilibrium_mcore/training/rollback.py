"""What a run does about an anomaly: it stops, leaves the update out, or goes back.

Going back, it loads the last good checkpoint into the model that is there, and passes over exactly
the samples of the steps that were bad. Seed and order stay, so the run is the one that would have
been told from the start to leave them out, and its ledger says which they are.
"""

from __future__ import annotations

from pathlib import Path

from equilibrium_mcore.checkpoint import directory, publish
from equilibrium_mcore.checkpoint.choose import StartingPoint, open_together
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import DamagedCheckpointError
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.run_data import build_run_datasets, documents_at
from equilibrium_mcore.training.setup import Run, resume

NAMED = 5  # documents that a message names


class AnomalyError(FloatingPointError):
    """A run that stops at a step that is not sound; nothing was updated by it."""


def too_many(run: Run) -> bool:
    """Whether the run has met more anomalies than its settings allow."""
    return run.watch.count > run.watch.settings.most


def stop(run: Run, anomaly: Anomaly) -> AnomalyError:
    """The error of a run that stops at an anomaly: the documents, and ways out."""
    settings = run.watch.settings
    why = (
        f"training.anomalies.policy={settings.policy}, and it is anomaly {run.watch.count} of the "
        f"run, of {settings.most} that are allowed (training.anomalies.most)"
        if settings.policy != "stop"
        else "training.anomalies.policy=stop"
    )
    without = (run.left_out + anomaly.ranges).as_lists()
    lines = [
        f"step {anomaly.step}: {anomaly.what}. Nothing was updated. {why}.",
        documents(run, anomaly),
        "Resume from the latest checkpoint with policy=skip or rollback, with a lower learning "
        f"rate, or without these samples: training.left_out={without}",
    ]
    return AnomalyError("\n".join(filter(None, lines)))


def documents(run: Run, anomaly: Anomaly) -> str:
    """Which documents the step was made of, and the command that shows their text."""
    ((first, count),) = anomaly.ranges
    named = documents_at(run.datasets.train, first, count)
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    shown = f"{command('ledger')} {run.config.output_directory} --position {first} --count {count}"
    return f"It read {', '.join(named[:NAMED])}{more}; their text: {shown} --show" if named else ""


def go_back(run: Run, anomaly: Anomaly) -> list[str]:
    """Load the last good checkpoint, and leave the bad samples out. Collective.

    Returns the new names of checkpoints that are not used any more: nothing is removed. Raises
    AnomalyError where there is no checkpoint to go back to.
    """
    margin = run.watch.settings.margin_steps
    ranges = run.ranges_of_next_step(and_before=margin)
    opened = _last_good(run, run.progress.step - margin)
    if opened is None:
        raise stop(run, anomaly)
    left_out, count = run.left_out + ranges, run.watch.count
    line = on_first_rank(lambda: Lineage.after(opened.facts))
    abandoned = on_first_rank(
        lambda: publish.go_back(run.config.output_directory, run.choice.line, opened.path)
    )
    run.stream.close()
    opened.facts["left_out"] = left_out.as_lists()
    run.choice = StartingPoint(opened, None, line, run.choice.notes)
    run.datasets = build_run_datasets(run.config, opened.facts)
    resume(run)
    run.left_out, run.watch.count = left_out, count
    run.stream = run.stream_of(run.datasets.train, consumed_samples=run.progress.samples)
    return abandoned


def _last_good(run: Run, step: int) -> OpenedCheckpoint | None:
    """The newest whole checkpoint of the run's own line, of at most this step. Collective."""
    names = on_first_rank(lambda: _own(run, step))
    for path in names:
        try:
            return open_together(path, needs_state=True, verify=run.config.checkpoint.verify)
        except DamagedCheckpointError:
            continue
    return None


def _own(run: Run, step: int) -> list[Path]:
    found = directory.list_checkpoints(run.config.output_directory)
    line = run.choice.line
    own = [path for path in found if line.holds(directory.peek_state(path))]
    return [path for path in reversed(own) if directory.step_of(path) <= step]
