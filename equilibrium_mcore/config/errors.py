"""The one error for settings that cannot be used: it carries every problem, not the first one."""

from __future__ import annotations

from collections.abc import Iterable

MOST_SHOWN = 50  # problems that are printed; a file of another kind has thousands


class ConfigError(ValueError):
    """Settings that cannot be used.

    `problems` holds one text per problem; each names the key, its value, the rule and a way out.
    `source` says where the settings came from, usually a file.
    """

    def __init__(self, problems: str | Iterable[str], *, source: object = None) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.source = None if source is None else str(source)
        super().__init__(self._text())

    def _text(self) -> str:
        count = len(self.problems)
        where = f" in {self.source}" if self.source else ""
        lines = [f"{count} problem{'' if count == 1 else 's'}{where}:"]
        for number, problem in enumerate(self.problems[:MOST_SHOWN], start=1):
            first, *rest = problem.splitlines() or [""]
            lines.append(f"  {number}. {first}")
            lines.extend(f"     {line}" for line in rest)
        if count > MOST_SHOWN:
            lines.append(f"  ... and {count - MOST_SHOWN:,} more")
        return "\n".join(lines)

    def __reduce__(self):
        # Exceptions travel between ranks by pickle, which would call us with the text alone.
        return _rebuild, (self.problems, self.source)


def _rebuild(problems: list[str], source: str | None) -> ConfigError:
    return ConfigError(problems, source=source)
