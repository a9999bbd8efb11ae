"""An experiment file, in the keys of `experiment_keys.py`, as the values of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from equilibrium_mcore.config import experiment_rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.experiment_keys import KEYS, OWN, SECTIONS, converted
from equilibrium_mcore.config.problems import MOST_EXPLAINED, nearest, unknown_key
from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.stages import DEFAULT_STAGE
from equilibrium_mcore.config.yaml_io import parse_yaml

MARK = "experiment"  # the section that only an experiment file has


@dataclass
class Experiment:
    """What an experiment file says.

    `values` are a run's, before changes; `overrides` are the changes that name settings: those
    that name they are in already. `written_as` gives for a setting the key that set it.
    """

    given: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    written_as: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # sections that could not be made

    def settle(self, values: dict[str, Any], launched: int | None) -> list[str]:
        """Give the micro-batch its value in `values`, the run's with all changes; what is wrong.

        `launched` is the number of ranks that a launcher started, if one did.
        """
        try:
            micro = experiment_rules.micro_batch(self.given, values, launched)
        except ConfigError as error:
            return error.problems
        if micro is not None:
            values["training"] = {**values["training"], "micro_batch_size": micro}
        return []

    def in_its_keys(self, problem: str) -> str:
        """A problem with a setting, with the key that it was written as."""
        key = re.match(r"[\w.]*", problem).group().rstrip(".")
        written = self.written_as.get(key)
        same = written in (None, key)
        return problem if same else f"{problem} (written as {written})"


def is_experiment(values: Mapping[str, Any]) -> bool:
    """Whether the values of a YAML file are those of an experiment file."""
    return MARK in values


def read_experiment(
    values: Mapping[str, Any], overrides: Sequence[str], *, folder: Path
) -> Experiment:
    """The experiment that a file in `folder` says, with `key=value` changes.

    Raises nothing: `problems` has what is wrong.
    """
    found = Experiment(problems=list(islice(_unknown(values), MOST_EXPLAINED)))
    for section in SECTIONS:
        inside = values.get(section) or {}
        if isinstance(inside, dict):
            found.given |= {f"{section}.{k}": v for k, v in inside.items()}
    found.given = {key: value for key, value in found.given.items() if key in KEYS}
    for override in overrides:
        _try(found, lambda o=override: _change(found, o))
    found.given = {key: value for key, value in found.given.items() if value is not None}
    for key, value in found.given.items():
        try:
            _set(found, key, converted(key, value))
        except ValueError as error:
            found.problems.append(f"{key}={value!r}: {error}")
    _set_together(found, _stage(values, overrides), folder)
    _lay_over(found, values.get(OWN) or {})
    return found


def _change(found: Experiment, override: str) -> None:
    """A change of a key; one of a setting is for later."""
    key, _, text = override.partition("=")
    key = key.strip()
    if key not in (*KEYS, "model", "data"):
        found.overrides.append(override)
        return
    value = parse_yaml(text, source=f"the value of {key}")
    if key in ("model", "data") and isinstance(value, str):
        key = f"{key}.config_path"
    if key in KEYS:
        found.given[key] = value
    else:
        found.overrides.append(override)


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    """Sections and keys that are none."""
    for section, inside in values.items():
        if section not in (*SECTIONS, OWN):
            yield (
                f"{section}: unknown section{nearest(section, [*SECTIONS, OWN])}; an experiment "
                f"file has {', '.join(SECTIONS)}, and {OWN} for settings in their own names"
            )
        elif inside is not None and not isinstance(inside, dict):
            yield f"{section}={inside!r}: must be a mapping of `key: value` lines"
        elif section != OWN:
            unknown = [key for key in inside or () if f"{section}.{key}" not in KEYS]
            yield from (_unknown_word(section, key) for key in unknown)


def _unknown_word(section: str, key: str) -> str:
    name = f"{section}.{key}"
    own = _setting_named(section, str(key))
    if own is not None:
        return f"{name}: not a key of this file, but a setting: write it below {OWN}: {own}"
    elsewhere = [known for known in KEYS if known.partition(".")[2] == key]
    here = [known.partition(".")[2] for known in KEYS if known.startswith(f"{section}.")]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else None
    return unknown_key(name, key, here, hint=hint)


def _setting_named(section: str, key: str) -> str | None:
    """`training: {precision: ...}` where the run has such a setting."""
    of_run = RunConfig.model_fields.get(section)
    fields = getattr(of_run.annotation, "model_fields", {}) if of_run is not None else {}
    return f"{section}: {{{key}: ...}}" if key in fields else None


def _stage(values: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The stage of the run, as far as the data's kind depends on it."""
    own = values.get(OWN)
    stage = own.get("stage", DEFAULT_STAGE) if isinstance(own, dict) else DEFAULT_STAGE
    changed = [o.partition("=")[2].strip() for o in overrides if o.startswith("stage=")]
    return str([stage, *changed][-1])


def _set_together(found: Experiment, stage: str, folder: Path) -> None:
    """Settings that several keys give their value."""
    given = found.given
    found.problems += experiment_rules.ranks(given)
    if given.get("training.use_ddp") is False:
        _set(found, "training.use_ddp", {"parallelism.world_size": 1})
    start = _try(found, lambda: experiment_rules.weights(given))
    if start is not None:
        _set(found, "model.checkpoint_path", {"checkpoint.initial_weights": start})
    project = _try(found, lambda: experiment_rules.logging(given)) or {}
    _set(found, "logging.wandb_project", project)
    for key, make in (
        ("model", lambda: experiment_rules.model(given)),
        ("data", lambda: experiment_rules.data(given, stage=stage, folder=folder)),
    ):
        section = _try(found, make)
        if section is None:
            found.unread.add(key)
        else:
            found.values[key] = merge(section, found.values.get(key, {}))
            found.written_as.setdefault(key, f"{key}.config_path")


def _set(found: Experiment, written: str, settings: Mapping[str, Any]) -> None:
    for setting, value in settings.items():
        *sections, name = setting.split(".")
        place = found.values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        found.written_as[setting] = written


def _lay_over(found: Experiment, own: Any) -> None:
    """`run:` over what the keys say; the same setting twice is an error."""
    if not isinstance(own, dict):
        return  # told as an unknown section is
    for setting, value in _leaves(own):
        written = found.written_as.get(setting)
        if written is not None and len(KEYS[written].settings) == 1:
            found.problems.append(
                f"{OWN}.{setting}={value!r}: {written} gives this setting its value: keep one "
                "of them"
            )
    found.values = merge(found.values, own)


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _try[T](found: Experiment, make: Callable[[], T]) -> T | None:
    """What `make` returns; its ConfigError joins the problems."""
    try:
        return make()
    except ConfigError as error:
        found.problems += error.problems
        return None
