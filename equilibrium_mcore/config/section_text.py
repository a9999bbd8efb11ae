"""A section on a command line: `type=language,languages=[en, de]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.yaml_io import parse_yaml


def section_from_text(text: str, *, kind: str, example: str) -> dict[str, Any]:
    """`key=value,key=value` as plain values; the values are YAML.

    `kind` and `example` are for the ConfigError that is raised when a part is no `key=value`.
    """
    values: dict[str, Any] = {}
    for part in _split_outside_brackets(text):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{kind} {text!r}: {part!r} is no key=value; write e.g. {example}")
        values[key.strip()] = parse_yaml(value, source=f"the value of {key.strip()}")
    return values


def _split_outside_brackets(text: str) -> Sequence[str]:
    """Parts between commas that stand outside of [], {} and quotation marks."""
    parts, depth, quote, start = [], 0, "", 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]
