"""Rewards for the form of a text: its tags, its length."""

from __future__ import annotations

import re

from equilibrium_mcore.config.rewards import FormatConfig, LengthRewardConfig, reward_name
from equilibrium_mcore.verification.scored import Example, Part, shown


class FormatReward:
    """1 where each tag opens and closes once, in order, one after the other; else 0."""

    def __init__(self, config: FormatConfig) -> None:
        self.name = reward_name(config)
        self.notes: list[str] = []
        self._config = config
        between = r".*?" if config.text_outside else r"\s*"
        names = [re.escape(tag) for tag in config.tags]
        pairs = [rf"<{name}>(?P<t{i}>.*?)</{name}>" for i, name in enumerate(names)]
        self._pattern = re.compile(between + between.join(pairs) + between, re.S)

    def score(self, example: Example) -> Part:
        """Count the tags, then look at their order and at what stands between them."""
        text = example.text
        if self._config.first_is_open:
            text = f"<{self._config.tags[0]}>{text}"
        for tag in self._config.tags:
            for mark in (f"<{tag}>", f"</{tag}>"):
                if (count := text.count(mark)) != 1:
                    return Part(self.name, 0.0, reason=f"{mark} occurs {count} times, not once")
        match = self._pattern.fullmatch(text)
        if match is None:
            return Part(self.name, 0.0, reason="tags out of order, or text outside of them")
        for number, tag in enumerate(self._config.tags):
            if not match[f"t{number}"].strip():
                return Part(self.name, 0.0, reason=f"nothing stands in <{tag}>")
        return Part(self.name, 1.0)


class LengthReward:
    """0, then a linear fall to -1 at `max_length` (DAPO), or a step beyond it."""

    def __init__(self, config: LengthRewardConfig) -> None:
        self.name = reward_name(config)
        self.notes: list[str] = []
        self._config = config

    def score(self, example: Example) -> Part:
        """Length against the bounds. A length in tokens must be given with the example."""
        length = self._length(example)
        if length is None:
            reason = "its length in tokens is not given; give it, or set unit: characters"
            return Part(self.name, 0.0, "error", reason=reason)
        return Part(self.name, self.value(length), reason=shown(f"{length} {self._config.unit}"))

    def value(self, length: int) -> float:
        """The reward of a length, -1 to 0."""
        most, start = self._config.max_length, self._config.soft_from
        if start is None:
            return -1.0 if length > most else 0.0
        if length <= start:
            return 0.0
        return max(-1.0, (start - length) / (most - start))

    def _length(self, example: Example) -> int | None:
        if self._config.unit == "tokens":
            return example.length
        if self._config.unit == "characters":
            return len(example.text)
        return len(example.text.split())
