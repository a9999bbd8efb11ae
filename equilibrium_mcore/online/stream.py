"""The stream of an online run: what feeds its steps is made of its own answers.

A rollout is made when the last one is used up, at the policy as it then is; from it come
`minibatches` times `passes` steps. Everything that decides how the run goes on is in `state()`: how
many prompts were asked, how many rollouts were made, the answers that are still to be trained on
with their values, and what the estimator keeps. Sampling has no state: it is a function of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.prompts import PromptSamples
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.generation.interface import Engine
from equilibrium_mcore.online.answers import Answer, Packed
from equilibrium_mcore.online.estimate import Estimator
from equilibrium_mcore.online.experience import packed_for, rank_batches
from equilibrium_mcore.online.report import figures_of
from equilibrium_mcore.online.rollouts import Gathered, JudgeOf, gather, sampling_of
from equilibrium_mcore.training.setup import Run

STATE = "online"
Seen = Callable[[Gathered, int], None]
PackedOf = Callable[[Run, Sequence[Answer]], Packed]


@dataclass
class Position:
    """How far the run has come in its prompts and rollouts."""

    prompts: int = 0
    rollouts: int = 0
    used: int = 0  # steps that were made of the present rollout


class OnlineStream:
    """A TrainStream of answers. All ranks have the whole of it; each gives its own batches."""

    def __init__(
        self,
        run: Run,
        *,
        engine: Engine,
        judge: JudgeOf,
        estimator: Estimator,
        packed_of: PackedOf = packed_for,
        seen: Seen = lambda gathered, step: None,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Goes on where the run's checkpoint left it. `packed_of` packs the answers of a step;
        `seen` is shown every rollout.

        Raises ConfigError for a checkpoint of other prompts.
        """
        assert isinstance(run.datasets.train, PromptSamples)
        self._run, self._prompts = run, run.datasets.train
        self.engine, self.judge, self._estimator = engine, judge, estimator
        self._packed_of, self._seen, self._at_end = packed_of, seen, at_end
        self._position = Position()
        self._answers: list[Answer] = []
        self._figures: dict[str, float] = {}
        progress = run.choice.progress
        if progress is not None:
            self._resume(progress.get(STATE), step=progress["step"])

    def next_batches(self, count: int) -> list[Batch]:
        """See TrainStream; as many as the answers fill, whatever `count` is. Collective."""
        if not self._answers:
            self._roll_out()
        self._estimator.ready(self._run.objective)
        return rank_batches(self._run, self._packed_of(self._run, self._minibatch()))

    def commit(self, samples: int) -> None:
        """See TrainStream: a step was made of the minibatch."""
        rollout = self._run.config.rollout
        self._position.used += 1
        if self._position.used == rollout.minibatches * rollout.passes:
            self._answers, self._position.used = [], 0

    def state(self) -> dict[str, Any]:
        """See TrainStream."""
        values = {
            "examples": self._prompts.fingerprint,
            "seed": self._prompts.seed,
            **vars(self._position),
            "answers": [answer.as_plain() for answer in self._answers],
            "figures": self._figures,
            "estimator": self._estimator.state(),
        }
        return {STATE: values}

    def figures(self) -> dict[str, float]:
        """What the present rollout was like, by name."""
        return self._figures

    def close(self) -> None:
        """See TrainStream."""
        self._at_end()

    # ------------------------------------------------------------------------------ the inside

    def _roll_out(self) -> None:
        run, rollout, position = self._run, self._run.config.rollout, self._position
        wanted = run.config.training.global_batch_size * rollout.minibatches
        gathered = gather(
            prompts=self._prompts,
            first=position.prompts,
            count=wanted // rollout.samples_per_prompt,
            config=rollout,
            engine=self.engine,
            sampling=sampling_of(
                rollout,
                self._prompts.stop_ids,
                seed=run.config.training.seed,
                rollout=position.rollouts,
            ),
            version=run.progress.step,
            judge=self.judge,
        )
        position.prompts += gathered.prompts_taken
        position.rollouts += 1
        self._answers, estimated = self._estimator.experience(run, gathered.groups)
        self._figures = {**figures_of(gathered), **estimated}
        self._seen(gathered, run.progress.step + 1)

    def _minibatch(self) -> list[Answer]:
        """The answers of the step to come: whole groups, in the order of the rollout."""
        number = self._position.used % self._run.config.rollout.minibatches
        size = self._run.config.training.global_batch_size
        return self._answers[number * size : (number + 1) * size]

    def _resume(self, state: dict[str, Any] | None, *, step: int) -> None:
        problem = None
        if state is None:
            problem = "it was trained on other data: start a new run in another output_directory"
        elif state["examples"] != self._prompts.fingerprint:
            problem = (
                f"its prompts are others (fingerprint {state['examples']}, now "
                f"{self._prompts.fingerprint}): put back the files, tokenizer, template, "
                "data.truth, max_tokens and too_long of before, or start from its weights "
                "(checkpoint.initial_weights)"
            )
        elif state["seed"] != self._prompts.seed:
            problem = (
                f"training.seed={self._prompts.seed}, and the run began with {state['seed']}: "
                "another order would repeat prompts; put it back"
            )
        if problem is not None:
            raise ConfigError(f"the checkpoint of step {step}: {problem}", source="resuming")
        self._position = Position(state["prompts"], state["rollouts"], state["used"])
        self._answers = [Answer.from_plain(plain) for plain in state["answers"]]
        self._figures = state["figures"]
        self._estimator.load(state["estimator"])
