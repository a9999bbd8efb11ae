"""The reward for a final answer that equals the true one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.config.rewards import MathAnswerConfig, reward_name
from equilibrium_mcore.verification.answers import find_answer
from equilibrium_mcore.verification.compare import Rules, TruthError, compare, unreadable
from equilibrium_mcore.verification.latex import INSTALL, is_installed, math_verify_expressions
from equilibrium_mcore.verification.scored import Example, Part, shown

MEMORY_BYTES = 1 << 30  # what one comparison may add
MAX_ANSWER = 10_000  # characters; a longer one is not read
_VERDICTS = {"equal": "ok", "different": "wrong", "unread": "unparsed"}


class MathAnswer:
    """1 for a right answer, else 0. For a worker that may be killed: math-verify can hang."""

    def __init__(self, config: MathAnswerConfig) -> None:
        """Raises ImportError where math-verify is asked for and missing."""
        self.name = reward_name(config)
        self._config = config
        self._rules = Rules(
            relative_tolerance=config.relative_tolerance,
            absolute_tolerance=config.absolute_tolerance,
            units=config.units,
            percent=config.percent,
            decimal_comma=config.decimal_comma,
            unevaluated=config.unevaluated,
        )
        self.notes: list[str] = []
        use_library = config.latex == "math_verify" or config.latex == "auto" and is_installed()
        if config.latex == "auto" and not use_library:
            self.notes.append(
                f"{self.name}: math-verify is not installed, so expressions that are no plain "
                f"numbers, intervals, sets or words are unparsed unless they are alike: {INSTALL}"
            )
        self._expressions = math_verify_expressions(self._rules) if use_library else unreadable

    def score(self, example: Example) -> Part:
        """Find the answer, compare it."""
        if not isinstance(example.truth, (str, int, float)) or isinstance(example.truth, bool):
            reason = f"its truth must be text or a number, and is {example.truth!r}"
            return Part(self.name, 0.0, "error", reason=shown(reason))
        answer = example.answer
        if answer is None:
            config = self._config
            found = find_answer(
                example.text, places=config.places, tag=config.tag, after=config.after
            )
            answer = None if found is None else found.text
        if not answer:
            return Part(self.name, 0.0, "unparsed", reason="no answer was found")
        if len(answer) > MAX_ANSWER:
            return Part(
                self.name, 0.0, "unparsed", shown(answer), f"longer than {MAX_ANSWER} characters"
            )
        truth = str(example.truth)
        if self._config.decimal_comma and isinstance(example.truth, float):
            truth = truth.replace(".", ",")
        return self._compared(truth, answer)

    def _compared(self, truth: str, answer: str) -> Part:
        try:
            with _limited_memory():
                equality = compare(truth, answer, rules=self._rules, expressions=self._expressions)
        except TruthError as error:
            return Part(self.name, 0.0, "error", shown(answer), str(error))
        except MemoryError:
            return Part(self.name, 0.0, "timeout", shown(answer), "more memory than it may have")
        except RecursionError:
            return Part(self.name, 0.0, "unparsed", shown(answer), "nested too deep")
        reason = "" if equality == "equal" else f"the truth is {truth!r}"
        if equality == "unread":
            reason = f"not read; {reason}"
        return Part(
            self.name, float(equality == "equal"), _VERDICTS[equality], shown(answer), shown(reason)
        )


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """A bound on what this process may add, on Linux: a huge number must not push out others."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        bound = pages * resource.getpagesize() + MEMORY_BYTES
        if before[0] != resource.RLIM_INFINITY:
            bound = min(bound, before[0])
        resource.setrlimit(resource.RLIMIT_AS, (bound, before[1]))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
