"""`${name}` in a pipeline file: variables, which a command line may change, and steps' outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import nearest
from equilibrium_mcore.config.yaml_io import parse_yaml

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
Value = str | int | float | bool | list[str]


@dataclass
class References:
    """What `${...}` may say: variables, and outputs of steps. `used` collects named steps."""

    variables: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def arguments(self, text: str, used: list[str] | None = None) -> list[str]:
        """`text` with references replaced; several where a variable is a list."""
        whole = _REFERENCE.fullmatch(text)
        if whole and isinstance(self.variables.get(whole[1]), list):
            return [str(item) for item in self.variables[whole[1]]]
        return [_REFERENCE.sub(lambda found: self._value(found[1], text, used), text)]

    def text(self, text: str, used: list[str] | None = None) -> str:
        """The one argument that `text` becomes."""
        arguments = self.arguments(text, used)
        if len(arguments) != 1:
            raise ConfigError(f"{text}: a list stands where one argument is needed")
        return arguments[0]

    def _value(self, name: str, text: str, used: list[str] | None) -> str:
        if name in self.outputs:
            if used is not None:
                used.append(name.partition(".")[0])
            return self.outputs[name]
        if name not in self.variables:
            known = [*self.variables, *self.outputs]
            raise ConfigError(
                f"{text}: ${{{name}}} is no variable and no step's output{nearest(name, known)}; "
                f"there are {', '.join(known)}"
            )
        if isinstance(self.variables[name], list):
            raise ConfigError(f"{text}: ${{{name}}} is a list, so it must stand alone")
        value = self.variables[name]
        return str(value).lower() if isinstance(value, bool) else str(value)


def names_of(
    own: Mapping[str, Value], outputs: Mapping[str, str], changes: Sequence[str]
) -> References:
    """Variables with their `variable=value` changes, each of which may use those before it.

    `outputs` are places by `step.output`, which may use variables. Raises ConfigError.
    """
    values = dict(own)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in values or key == "name":
            known = [name for name in values if name != "name"]
            raise ConfigError(
                f"{change}: write VARIABLE=VALUE{nearest(key, known)}; variables are "
                f"{', '.join(known)}"
            )
        values[key] = _of_kind(values[key], parse_yaml(text, source=f"the value of {key}"), key)
    names = References()
    for key, value in values.items():
        if isinstance(value, list):
            names.variables[key] = [word for item in value for word in names.arguments(item)]
        else:
            names.variables[key] = names.text(value) if isinstance(value, str) else value
    names.outputs = {key: names.text(place) for key, place in outputs.items()}
    return names


def _of_kind(old: Value, new: Any, key: str) -> Any:
    """The new value; where the old one is a list, one too."""
    if isinstance(old, list):
        return [str(item) for item in (new if isinstance(new, list) else [new])]
    if isinstance(new, (list, dict)) or new is None:
        raise ConfigError(f"{key}={new!r}: must be one value")
    return new
