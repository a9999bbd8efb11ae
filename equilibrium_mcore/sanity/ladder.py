"""The ladder: all checks in order, each on the run it needs."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from equilibrium_mcore.certify.tokens import MadeUpTokens
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.processes.threads import one_thread
from equilibrium_mcore.sanity import data_checks, learning_checks, model_checks
from equilibrium_mcore.sanity.verdict import Check, CheckVerdict, SanityReport, skipped
from equilibrium_mcore.sanity.workbench import observe, sanity_config, varied
from equilibrium_mcore.training.run_data import build_run_datasets, with_steps
from equilibrium_mcore.training.setup import run_alone

OBSERVED_STEPS = 4
NEEDS_DATA = ("batch_statistics", "data_order", "validation_split")
NEEDS_STEPS = (
    "alignment",
    "initial_loss",
    "loss_alignment",
    "causality",
    "gradients",
    "router",
    "optimizer_groups",
    "determinism",
)
NAMES = ("schedule", *NEEDS_DATA, *NEEDS_STEPS, "overfit", "precision")


def run_ladder(
    config: RunConfig,
    *,
    only: Sequence[str] = (),
    made_up_tokens: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> SanityReport:
    """Run the checks named in `only` (all where empty) and report; `show` gets each as it ends.

    With `made_up_tokens` no data is read, and the checks of the data are skipped. Raises
    ConfigError for an unknown check, and for data that pretraining could not read either.
    """
    unknown = sorted(set(only) - set(NAMES))
    if unknown:
        raise ConfigError(f"check {unknown[0]!r} is unknown; there are {', '.join(NAMES)}")
    # The model is tiny: more threads would only wait for each other.
    with one_thread(), temporary_folder("equilibrium_sanity_") as folder:
        if not made_up_tokens:
            config = _with_steps(config, folder)
        small, changes = sanity_config(config, folder=folder, made_up_tokens=made_up_tokens)
        if made_up_tokens:
            changes.append("made-up tokens instead of the run's data")
        ladder = _Ladder(config, small, made_up_tokens, set(only) or set(NAMES), show)
        ladder.report.changes = changes
        show("\n".join(f"changed for the checks: {change}" for change in changes))
        ladder.climb()
    return ladder.report


class _Ladder:
    """The checks of one run, and what they share."""

    def __init__(
        self,
        asked: RunConfig,
        config: RunConfig,
        made_up: bool,
        wanted: set[str],
        show: Callable[[str], None],
    ) -> None:
        self.asked, self.config, self.made_up = asked, config, made_up
        self.wanted, self.show = wanted, show
        self.report = SanityReport(run=asked.name, changes=[])

    def climb(self) -> None:
        """Run what is wanted, cheapest first."""
        self._try("schedule", self._schedule)
        datasets, tokenizer = self._data()
        if self.wanted & {*NEEDS_DATA, *NEEDS_STEPS}:
            self._first_steps(datasets, tokenizer)
        self._try(
            "overfit", lambda: learning_checks.check_overfit(self.config, datasets, tokenizer)
        )
        asked = self.asked.training.precision
        self._try(
            "precision", lambda: learning_checks.check_precision(self.config, datasets, asked=asked)
        )

    def _data(self) -> tuple[Datasets, Tokenizer | None]:
        training = self.config.training
        if self.made_up:
            tokens = MadeUpTokens(
                samples=training.steps * training.global_batch_size,
                sequence_length=training.sequence_length,
                vocab_size=self.config.model.vocab_size,
                seed=training.seed,
            )
            return Datasets(tokens, tokens, None), None
        try:
            return build_run_datasets(self.config), load_tokenizer(self.config.data.tokenizer)
        except ConfigError as error:
            if "none for validation" not in str(error):
                raise
        # A run that never validates may have a split without validation.
        self.config = varied(self.config, training={"validation_interval_steps": 0})
        return build_run_datasets(self.config), load_tokenizer(self.config.data.tokenizer)

    def _first_steps(self, datasets: Datasets, tokenizer: Tokenizer | None) -> None:
        # At the peak rate, so that a step moves every parameter by more than rounding.
        config = varied(
            self.config,
            optimizer={"schedule": {"kind": "constant", "warmup_steps": 0, "decay_steps": 0}},
        )
        with run_alone(config, datasets=datasets) as run:
            for name, check in (
                (
                    "batch_statistics",
                    lambda: data_checks.check_batch_statistics(datasets, tokenizer),
                ),
                ("data_order", lambda: data_checks.check_data_order(run)),
                ("validation_split", lambda: data_checks.check_validation_split(datasets)),
            ):
                if tokenizer is None:
                    check = self._no_data(name)
                self._try(name, check)
            if not self.wanted & set(NEEDS_STEPS):
                return
            try:
                seen = observe(run, steps=OBSERVED_STEPS)
            except Exception as error:  # e.g. gradients that are not finite
                self._add(_raised("first_steps", error))
                return
            ended = self.config.data.type == "indexed"  # by the end of a document
            self._try(
                "alignment", lambda: data_checks.check_alignment(seen, tokenizer, ended=ended)
            )
            self._try(
                "initial_loss",
                lambda: model_checks.check_initial_loss(run, seen, self.asked.model),
            )
            self._try("loss_alignment", lambda: model_checks.check_loss_alignment(run, seen))
            self._try("causality", lambda: model_checks.check_causality(run, seen))
            self._try("gradients", lambda: model_checks.check_gradients(seen))
            self._try("router", lambda: model_checks.check_router(run, seen))
            self._try("optimizer_groups", lambda: model_checks.check_optimizer_groups(seen))
            self._try("determinism", lambda: model_checks.check_determinism(run, seen))

    def _schedule(self) -> Check:
        if self.asked.training.steps is None:
            return skipped("schedule", "training.epochs become steps when the data is read")
        return learning_checks.show_schedule(self.asked)

    def _no_data(self, name: str) -> Callable[[], Check]:
        return lambda: skipped(name, "made-up tokens were asked for")

    def _try(self, name: str, check: Callable[[], Check]) -> None:
        if name not in self.wanted:
            return
        start = time.perf_counter()
        try:
            done = check()
        except Exception as error:  # one check's failure must not hide the others
            done = _raised(name, error)
        self._add(dataclasses.replace(done, seconds=time.perf_counter() - start))

    def _add(self, done: Check) -> None:
        self.report.checks.append(done)
        self.show(done.text())


def _with_steps(config: RunConfig, folder: Path) -> RunConfig:
    """Epochs as steps; what is encoded for that stays out of the run's own folder."""
    if config.training.steps is not None:
        return config
    elsewhere = config.data.model_copy(update={"cache_directory": folder / "data_cache"})
    return with_steps(config.model_copy(update={"data": elsewhere}))


def _raised(name: str, error: Exception) -> Check:
    lines = traceback.format_exception(error)[-1].strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Check(
        name,
        CheckVerdict.FAIL,
        f"raised {lines[0]}",
        details=[*lines[1:], f"at {where.filename}:{where.lineno} in {where.name}"],
    )
