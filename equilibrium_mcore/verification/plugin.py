"""Rewards of users: a function by its import path, `my_package.my_module:function`."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from equilibrium_mcore.config.rewards import PluginConfig, reward_name
from equilibrium_mcore.verification.scored import VERDICTS, Example, Part, RewardError, shown

FORM = "def reward(*, prompt, text, truth, **arguments) -> float, or (float, verdict)"


class Plugin:
    """Calls a function for each text, in a worker process."""

    def __init__(self, config: PluginConfig) -> None:
        """Raises RewardError where the function is missing or takes other arguments."""
        self.name = reward_name(config)
        self.notes: list[str] = []
        self._path, self._arguments = config.path, config.arguments
        self._function = load_function(config.path)
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # some of C have none
            return
        try:
            signature.bind(prompt="", text="", truth=None, **self._arguments)
        except TypeError as error:
            names = ", ".join(("prompt", "text", "truth", *self._arguments))
            raise RewardError(
                f"reward {self.name!r}: {self._path}{signature} cannot be called with {names} "
                f"({error}); it must be: {FORM}"
            ) from None

    def score(self, example: Example) -> Part:
        """Its value. Raises RewardError for a value of another type: a fault of its code."""
        value = self._function(
            prompt=example.prompt, text=example.text, truth=example.truth, **self._arguments
        )
        verdict = None
        if isinstance(value, tuple) and len(value) == 2:
            value, verdict = value
        if not isinstance(value, (int, float)) or verdict not in (None, *VERDICTS):
            raise RewardError(self._wrong(value, verdict))
        if not math.isfinite(value):
            return Part(self.name, 0.0, "error", reason=f"it returned {value}")
        return Part(self.name, float(value), verdict)

    def _wrong(self, value: object, verdict: object) -> str:
        what = f"{value!r} ({type(value).__name__})"
        if isinstance(value, (int, float)):
            what = f"the verdict {verdict!r}; there are {', '.join(VERDICTS)}"
        return shown(f"reward {self.name!r}: {self._path} returned {what}; it must be: {FORM}")


def load_function(path: str) -> Callable[..., Any]:
    """The function at `package.module:name`. Raises RewardError that says what is missing."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # its own code may raise anything
        raise RewardError(
            f"path={path!r}: importing {module_name} failed ({type(error).__name__}: {error}); it "
            "must be importable where the run starts: install it, or add its folder to PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        what = "is not callable" if function is not None else "is not there"
        raise RewardError(
            f"path={path!r}: {name} {what} in {module_name}; its functions: "
            f"{', '.join(names) or 'none'}"
        )
    return function
