"""Reads a mixture: its file, `key=value` overrides, copies in place of the Hub, all rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import apply_override
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.mixture_files import find_mixture, mixture_name
from equilibrium_mcore.config.mixture_rules import check_mixture
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.yaml_io import read_mapping


def load_mixture(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    local: Sequence[str] = (),
    temperature: float | None = None,
) -> MixtureConfig:
    """The mixture in a YAML file, with `key=value` overrides, all rules checked.

    `path` may be relative to `configs/data`, with or without its ending. `local` holds
    `name=path`: that dataset is read from there. `temperature` sets that of every dataset.
    Raises ConfigError with every problem.
    """
    file = find_mixture(path)
    values = read_mapping(file)
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(values, override, folder=file.parent, kind=MixtureConfig)
        except ConfigError as error:
            problems += error.problems
    problems += _stand_in(values, local)
    if temperature is not None:
        for dataset in _datasets(values):
            dataset["sampling"] = {**(dataset.get("sampling") or {}), "temperature": temperature}
    values.setdefault("name", mixture_name(file))
    parsed = parse(MixtureConfig, values)
    if isinstance(parsed, list):
        problems += [problem.text for problem in parsed]
    elif not problems:
        problems += check_mixture(parsed)
    if problems:
        raise ConfigError(dict.fromkeys(problems), source=file)
    return parsed


def _datasets(values: dict[str, Any]) -> list[dict[str, Any]]:
    datasets = values.get("datasets")
    return [d for d in datasets if isinstance(d, dict)] if isinstance(datasets, list) else []


def _stand_in(values: dict[str, Any], local: Sequence[str]) -> list[str]:
    """Lay `name=path` over the datasets; what the Hub alone needs is taken away."""
    problems = []
    by_name = {dataset.get("name"): dataset for dataset in _datasets(values)}
    for item in local:
        name, equals, path = item.partition("=")
        if not equals or not path:
            problems.append(f"--local {item}: write NAME=PATH, e.g. --local code=data/code.jsonl")
        elif name not in by_name:
            known = ", ".join(str(key) for key in by_name)
            problems.append(f"--local {item}: the mixture has no dataset {name!r}; it has {known}")
        else:
            dataset = by_name[name]
            for key in ("format", "subset", "revision", "data_files", "streaming"):
                dataset.pop(key, None)
            dataset["source"] = path
    return problems
