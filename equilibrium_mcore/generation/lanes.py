"""The rows of one group while they are continued: what goes into each pass and comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.generation.answers import Answers
from equilibrium_mcore.generation.rows import Group, Pack, Wave
from equilibrium_mcore.generation.sampling import row_seeds
from equilibrium_mcore.models.decode.state import DecodeState, Prefill, Step, prefill


@dataclass
class Pass:
    """One forward pass: tokens [1, T] of a lane, and what its layers do with them."""

    state: DecodeState
    work: Prefill | Step
    tokens: Tensor
    seeds: Tensor | None = None  # [R], of a step
    places: Tensor | None = None  # [R], in the answers


class Lane:
    """The rows of one group while they are continued."""

    def __init__(self, group: Group, wave: Wave, answers: Answers, device: torch.device) -> None:
        self.group, self.wave, self.answers, self.device = group, wave, answers, device
        # Two rows more: one stays empty, for prompts of one token and for rows that only pad; into
        # the other goes the token of a pack without prompts.
        self.state = DecodeState(rows=len(group.prompts) + 2, capacity=wave.capacity)
        requests = [answers.requests[number] for number in group.requests]
        padding = wave.rows - len(requests)
        self.lengths = np.array([len(r.prompt.ids) for r in requests] + [1] * padding)
        self.tokens = np.array([r.prompt.ids[-1] for r in requests] + [0] * padding)
        seeds = np.concatenate([row_seeds(requests, answers.sampling), np.zeros(padding, np.int64)])
        self.seeds = torch.from_numpy(seeds).to(device)
        self.finished = np.array([False] * len(requests) + [True] * padding)
        self.numbers = np.array([*group.requests, *[-1] * padding])  # of each row's request
        self.done = 0  # steps

    def pass_of_pack(self, number: int) -> Pass:
        """A pack of the group; one of a token that nobody asked for where it has no more."""
        packs, aside = self.group.packs, len(self.group.prompts) + 1
        pack = packs[number] if number < len(packs) else Pack(aside, ())
        prompts = [self.answers.requests[n].prompt.ids[:-1] for n in pack.prompts]
        prompts = prompts or [np.zeros(1, dtype=np.int32)]
        work = prefill(
            [len(ids) for ids in prompts],
            first=pack.first,
            tokens=self.wave.pack_tokens,
            device=self.device,
        )
        tokens = np.zeros((1, self.wave.pack_tokens), dtype=np.int64)
        real = np.concatenate(prompts)
        tokens[0, : len(real)] = real
        return Pass(self.state, work, torch.from_numpy(tokens).to(self.device))

    def begin_steps(self) -> None:
        """Give every row the state of its prompt."""
        empty = len(self.group.prompts)
        source = [empty if place < 0 else place for place in self.group.source]
        source += [empty] * (self.wave.rows - len(source))
        self.state.take(torch.tensor(source))

    def pass_of_step(self) -> Pass:
        positions = self.lengths - 1 + self.done
        return Pass(
            self.state,
            Step(torch.from_numpy(positions).to(self.device), longest=int(positions.max()) + 1),
            torch.from_numpy(self.tokens[None]).to(self.device),
            seeds=self.seeds,
            places=torch.full_like(self.seeds, self.done),
        )

    def take(self, ids: np.ndarray, logprobs: np.ndarray, support: np.ndarray | None) -> None:
        """The tokens that were drawn. Finished rows step on, and what they draw is dropped."""
        for row in (~self.finished).nonzero()[0]:
            kept = None if support is None else support[row]
            number = int(self.numbers[row])
            self.finished[row] = self.answers.add(number, int(ids[row]), logprobs[row], kept)
        self.tokens = ids
        self.done += 1

    def keep_unfinished(self, rows: int) -> None:
        """Go on with `rows` rows: those that are unfinished, and finished ones beside them."""
        kept = np.argsort(self.finished, kind="stable")[:rows]
        self.state.take(torch.from_numpy(kept))
        self.seeds = self.seeds[torch.from_numpy(kept).to(self.device)]
        for name in ("lengths", "tokens", "finished", "numbers"):
            setattr(self, name, getattr(self, name)[kept])
