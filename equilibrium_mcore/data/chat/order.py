"""In which order examples are trained on, and where a run stands in it.

Each epoch is a seeded permutation of all examples. It is gone through in windows: the next `window`
examples are packed into sequences together, and these are given out in a seeded order of their own,
since packing sorts by length. The last window of an epoch is smaller, so epochs follow each other
strictly.

The state names the examples of the window under way and how many of its sequences were given out.
So the sequence length and the window may change at a resume, too: what the old packing had given
out stays given out, and the rest of the window is packed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.fill import first_fit_decreasing, padded
from equilibrium_mcore.data.ledger.permutation import Permutation

STATE_VERSION = 1


class SequencePlan(NamedTuple):
    """One sequence, before its tokens are read: its epoch, from 0, and its examples in order."""

    epoch: int
    examples: tuple[int, ...]


class Packing(NamedTuple):
    """What decides how a window becomes sequences."""

    sequence_length: int
    document_multiple: int


class ExampleOrder:
    """Gives out packed sequences of examples, without end.

    Its state is plain values (`state`), the same on every rank and in every layout.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        fingerprint: str,
        *,
        seed: int,
        window: int,
        packing: Packing,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`lengths` are int[examples]; `fingerprint` tells these examples from others.

        Start at the first example, or resume at `state`. Raises ConfigError for a state of other
        examples, another seed or another program.
        """
        self.lengths, self.fingerprint = lengths, fingerprint
        self.seed, self.window, self.packing = seed, window, packing
        self.epoch, self.place = 0, 0  # where the next window begins
        self._open: tuple[int, ...] = ()  # examples of the window under way
        self._opened_in, self._given = 0, 0  # their epoch; how many sequences are given out
        self._plans: list[SequencePlan] = []
        if state is not None:
            self._resume(state)

    def copy(self) -> ExampleOrder:
        """A second one at the same place."""
        other = object.__new__(ExampleOrder)
        other.__dict__.update(self.__dict__)
        return other

    def take(self) -> SequencePlan:
        """The next sequence."""
        self._open_window()
        self._given += 1
        return self._plans[self._given - 1]

    def skip(self, samples: int) -> None:
        """Move on by so many sequences."""
        while samples > 0:
            self._open_window()
            step = min(samples, len(self._plans) - self._given)
            self._given += step
            samples -= step

    @property
    def between_epochs(self) -> bool:
        """Whether every sequence of the epochs begun is given out."""
        return self.place == 0 and self._given == len(self._plans)

    def state(self) -> dict[str, Any]:
        """All that `state=` needs to resume here: plain values that JSON keeps exactly.

        `epoch` and `place` are those of the next window; `open` names the examples of the window
        under way, of epoch `opened_in`, and `given` how many of its sequences are given out.
        """
        whole = self._given == len(self._plans)
        return {
            "version": STATE_VERSION,
            "examples": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "place": self.place,
            "opened_in": self._opened_in,
            "open": [] if whole else list(self._open),
            "given": 0 if whole else self._given,
            "packing": self.packing._asdict(),
        }

    # ------------------------------------------------------------------------------ the inside

    def _open_window(self) -> None:
        if self._given < len(self._plans):
            return
        count = len(self.lengths)
        end = min(self.place + self.window, count)
        order = Permutation(count, f"conversations/{self.seed}/{self.epoch}")
        self._opened_in, self._given = self.epoch, 0
        self._open = tuple(order(self.place, end).tolist())
        self.epoch, self.place = (self.epoch + 1, 0) if end == count else (self.epoch, end)
        self._plans = self._packed(self.packing)

    def _packed(self, packing: Packing) -> list[SequencePlan]:
        """The sequences of the window under way, in the order in which they are given out."""
        numbers = np.array(self._open, np.int64)
        lengths = padded(self.lengths[numbers].astype(np.int64), packing.document_multiple)
        bins = first_fit_decreasing(lengths, packing.sequence_length)
        # Which window it is shows in its first example: it comes once in an epoch.
        shuffled = Permutation(
            len(bins), f"sequences/{self.seed}/{self._opened_in}/{self._open[0]}"
        )
        return [
            SequencePlan(self._opened_in, tuple(numbers[bins[number]].tolist()))
            for number in shuffled(0, len(bins)).tolist()
        ]

    def _resume(self, state: dict[str, Any]) -> None:
        self._check(state)
        self.epoch, self.place = state["epoch"], state["place"]
        self._opened_in, self._open = state["opened_in"], tuple(state["open"])
        if not self._open:
            return
        before = Packing(**state["packing"])
        self._plans, self._given = self._packed(before), state["given"]
        if before == self.packing:
            return
        given = {number for plan in self._plans[: self._given] for number in plan.examples}
        self._open = tuple(number for number in self._open if number not in given)
        self._plans, self._given = self._packed(self.packing), 0

    def _check(self, state: dict[str, Any]) -> None:
        problems = []
        if state.get("version") != STATE_VERSION:
            problems.append(
                f"the state of the conversations has version {state.get('version')!r}, and this "
                f"program reads version {STATE_VERSION}: resume with the program that wrote it"
            )
        elif state["examples"] != self.fingerprint:
            problems.append(
                f"the examples are not those that the run has trained on so far (fingerprint "
                f"{state['examples']}, now {self.fingerprint}): put back the files, tokenizer, "
                "template, max_tokens and too_long of before, or start from its weights "
                "(checkpoint.initial_weights)"
            )
        elif state["seed"] != self.seed:
            problems.append(
                f"training.seed={self.seed}, and the run began with {state['seed']}: another order "
                "would repeat examples; put it back"
            )
        if problems:
            raise ConfigError(problems, source="resuming in the conversations")
