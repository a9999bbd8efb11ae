"""What is judged, and what a judgement is: values between rewards and who asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Verdict = Literal["ok", "wrong", "unparsed", "timeout", "error"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
# Of several rewards of a text, the last of these that occurs is the text's.
_ORDER = ("ok", "wrong", "unparsed", "timeout", "error")

MAX_SHOWN = 500  # characters of a reason


class RewardError(ValueError):
    """A reward that cannot be used, or that is not what it has to be; said to the user."""

    is_told = True


@dataclass(frozen=True)
class Example:
    """A text to be judged.

    `truth` is what its rewards need: the true answer, or the tests. `answer` is given where it was
    taken out of a text already. `length` is that of the text in tokens.
    """

    text: str
    truth: Any = None
    prompt: str = ""
    key: str = ""
    answer: str | None = None
    length: int | None = None


@dataclass(frozen=True)
class Part:
    """What one reward says of a text.

    `value` is 0 wherever there is none: `verdict` tells why. Rewards that do not judge an answer
    (format, length) have no verdict.
    """

    name: str
    value: float
    verdict: Verdict | None = None
    answer: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Scored:
    """What a text is worth: `reward` is the weighted sum of `parts`.

    An `error` is a fault of the verifier, so such a text should not be trained on: its reward is
    no opinion on it.
    """

    example: Example
    reward: float
    verdict: Verdict
    answer_text: str
    parts: dict[str, float]
    details: dict[str, Part] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """As a line of JSON has it, without the example."""
        return {
            "verdict": self.verdict,
            "reward": self.reward,
            "answer_text": self.answer_text,
            "parts": self.parts,
            "verdicts": {n: p.verdict for n, p in self.details.items() if p.verdict},
            "reasons": {n: p.reason for n, p in self.details.items() if p.reason},
        }


def worst(verdicts: Iterable[str | None]) -> Any:
    """The verdict on a text of which its rewards gave these; None of those that give none."""
    return max((verdict for verdict in verdicts if verdict), key=_ORDER.index, default="ok")


def combine(example: Example, parts: Iterable[Part], weights: Mapping[str, float]) -> Scored:
    """The judgement of all rewards."""
    details = {part.name: part for part in parts}
    return Scored(
        example=example,
        reward=sum(weights[name] * part.value for name, part in details.items()),
        verdict=worst(part.verdict for part in details.values()),
        answer_text=next((part.answer for part in details.values() if part.answer), ""),
        parts={name: part.value for name, part in details.items()},
        details=details,
    )


def count_verdicts(scored: Iterable[Scored]) -> dict[str, Counter[str]]:
    """By reward, how often each verdict was given; `all` is that of the texts."""
    counts: dict[str, Counter[str]] = {}
    for one in scored:
        counts.setdefault("all", Counter())[one.verdict] += 1
        for name, part in one.details.items():
            if part.verdict:
                counts.setdefault(name, Counter())[part.verdict] += 1
    return counts


def shown(text: object) -> str:
    """A reason on one line, no longer than is read."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_SHOWN else f"{line[: MAX_SHOWN - 3]}..."
