"""Reads a run: YAML file, overrides from the command line, all checks, and the saved copy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.experiment import is_experiment, read_experiment
from equilibrium_mcore.config.installation import command, shipped
from equilibrium_mcore.config.layout import launched_world_size
from equilibrium_mcore.config.problems import parse, parse_field, takes_text
from equilibrium_mcore.config.references import FOLDERS, resolve
from equilibrium_mcore.config.rule_kit import GPU_HOST, Host, choices
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.config.stages import with_stage_defaults
from equilibrium_mcore.config.yaml_io import parse_yaml, read_mapping, to_yaml
from equilibrium_mcore.files.paths import expand_path, what_is_there
from equilibrium_mcore.files.whole import write_whole

HOSTS = ("this", "gpu")
# With these YAML begins an alias, an anchor, a tag, a directive and a comment, or nothing at all.
RESERVED = tuple("*&!%@`#")

USAGE = """\
usage: {program} RUN.yaml [key=value ...] [--check [--host this|gpu]]

Trains the model that RUN.yaml names on the data that it names: every stage (`stage:`).
`python -m equilibrium_mcore.pretrain` is the same command.

  RUN.yaml         a run, e.g. configs/runs/quickstart.yaml, or an experiment file, e.g.
                   configs/experiments/pretrain_template.yaml (docs/guides/experiments.md)
  key=value        overrides a setting; the value is YAML, and keys reach inside the model and
                   the data:  training.steps=100  model.moe.top_k=4  data.sources.0.weight=0.5
                   model=llama_1b  optimizer.adamw.learning_rates='{embedding: 1e-3}'
  --check          prints the effective config, if a start would accept it, or every problem:
                   settings, data, tokenizer, checkpoints, the output directory; starts nothing
  --host this|gpu  what --check judges by: this host (the default), or one with a GPU, Transformer
                   Engine and mamba-ssm; what is not on this host is then said and left out
  --help           prints this

sections of a run:
{sections}

Every setting, its default and its meaning: docs/reference/configuration.md
example: {program} configs/runs/quickstart.yaml training.steps=20
"""


def usage(program: str) -> str:
    """What `--help` prints; `program` is what a user calls."""
    lines = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        text = field.description or (getattr(section, "__doc__", "") or "").splitlines()[0]
        lines.append(f"  {name:<17}{text}")
    return USAGE.replace("{program}", program).replace("{sections}", "\n".join(lines))


def load_run_config(
    arguments: Sequence[str],
    *,
    host: Host | None = None,
    program: str | None = None,
    also_check: Callable[[RunConfig, bool], object] = lambda config, elsewhere: None,
) -> RunConfig:
    """The run that the command line `RUN.yaml [key=value ...]` asks for.

    Under a launcher (torchrun, srun) its number of ranks is checked too, and so is what `host`
    has, if that is given. Raises ConfigError with every problem; `--help` and `--check` print and
    raise SystemExit(0). What is no matter of settings is left to `also_check`, which `--check`
    calls with the run and whether it is for another host (`--host gpu`): a run for a cluster can
    be checked on a laptop.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage(program or command("run")))
        raise SystemExit(0)
    check_only, (elsewhere, given) = "--check" in arguments, _host_option(arguments)
    given = [argument for argument in given if argument != "--check"]
    problems = []
    if elsewhere is not None and not check_only:
        problems.append("--host is for --check: a start is judged by the host that it is on")
    paths = [word for word in given if "=" not in word and not word.startswith("-")]
    problems += [
        f"{word}: unknown option; settings are given as key=value, e.g. training.steps=100"
        for word in given
        if word.startswith("-")
    ]
    if len(paths) != 1:
        found = f"{len(paths)}: {', '.join(paths)}" if paths else "none"
        problems.append(
            f"one run file is needed, e.g. configs/runs/quickstart.yaml; found {found} (an "
            "override needs a =, as in training.steps=100)"
        )
    if problems:
        raise ConfigError(problems, source="the command line")
    overrides = [word for word in given if "=" in word]
    world_size = launched_world_size(os.environ)
    judged_by = GPU_HOST if elsewhere else host
    config = load_run(paths[0], overrides, world_size=world_size, host=judged_by)
    if check_only:
        try:
            also_check(config, bool(elsewhere))
        except ConfigError as error:
            raise ConfigError(error.problems, source=paths[0]) from None
        sys.stdout.write(to_yaml(config.model_dump(mode="json")))
        raise SystemExit(0)
    return config


def _host_option(arguments: Sequence[str]) -> tuple[bool | None, list[str]]:
    """Whether `--host` names another host (None: it is not there), and the other arguments.

    Raises ConfigError for a host that is none.
    """
    given, elsewhere = list(arguments), None
    for index, word in enumerate(arguments):
        if word == "--host" or word.startswith("--host="):
            name = word.partition("=")[2] if "=" in word else "".join(arguments[index + 1 :][:1])
            if name not in HOSTS:
                raise ConfigError(
                    f"--host {name}: must be one of {', '.join(HOSTS)}", source="the command line"
                )
            elsewhere = name == "gpu"
            given.remove(word)
            if "=" not in word:
                given.remove(name)
    return elsewhere, given


def load_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    host: Host | None = None,
) -> RunConfig:
    """The run in the YAML file `path`, with `key.subkey=value` overrides, all checked.

    `world_size` is what a launcher started, if one did; `host` holds what this machine has, if
    that is known. Raises ConfigError with every problem found.
    """
    try:
        path = shipped(expand_path(path))
    except ValueError as error:
        raise ConfigError(f"run file {error}") from None
    if (found := what_is_there(path)) is not None:
        raise ConfigError(f"run file {path}: {found}; see configs/runs for examples")
    values = read_mapping(path)
    if is_experiment(values):
        return _load_experiment(values, overrides, path, world_size, host)
    problems: list[str] = []
    _apply_overrides(values, overrides, problems, path.parent)
    return _finish(values, problems, path.parent, path, world_size, host)


def run_from_mapping(
    values: Mapping[str, Any],
    *,
    folder: str | Path = ".",
    world_size: int | None = None,
    host: Host | None = None,
) -> RunConfig:
    """The run that `values` describe, as `load_run` would read it from a file in `folder`."""
    return _finish(dict(values), [], Path(folder), None, world_size, host)


def load_model(path_or_name: str | Path) -> ModelConfig:
    """The model of a YAML file, or of a bare name in `configs/models`, checked by its own rules."""
    values = resolve(str(path_or_name), kind="model", folder=Path.cwd())
    model = parse(ModelConfig, values, key="model")
    if isinstance(model, list):
        raise ConfigError([problem.text for problem in model], source=path_or_name)
    problems = rules.check_model(model)
    if problems:
        raise ConfigError(problems, source=path_or_name)
    return model


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the effective config as YAML; `load_run` reads it back to an equal value."""
    write_whole(path, to_yaml(config.model_dump(mode="json")))


# --------------------------------------------------------------------------------- the inside


def _collect(problems: list[str], action) -> Any:
    """Run `action`; its ConfigError joins `problems`."""
    try:
        return action()
    except ConfigError as error:
        where = f"{error.source}: " if error.source else ""
        problems.extend(where + problem for problem in error.problems)
        return None


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], problems: list[str], folder: Path
) -> None:
    for override in overrides:
        _collect(problems, lambda o=override: apply_override(values, o, folder=folder))


def _load_experiment(
    values: dict[str, Any],
    overrides: Sequence[str],
    path: Path,
    world_size: int | None,
    host: Host | None,
) -> RunConfig:
    """The run of an experiment file; problems are reported in the file's own keys."""
    experiment = read_experiment(values, overrides, folder=path.parent)
    values, problems = experiment.values, list(experiment.problems)
    _apply_overrides(values, experiment.overrides, problems, path.parent)
    problems += experiment.settle(values, world_size)
    try:
        return _finish(
            values, problems, path.parent, path, world_size, host, unread=experiment.unread
        )
    except ConfigError as error:
        told = [experiment.in_its_keys(problem) for problem in error.problems]
        raise ConfigError(told, source=path) from None


def _finish(
    values: dict[str, Any],
    problems: list[str],
    folder: Path,
    source: Path | None,
    world_size: int | None,
    host: Host | None,
    unread: Collection[str] = (),
) -> RunConfig:
    """Resolve references, check every section and every rule, and raise all problems at once.

    What is wrong with sections that are `unread` is among the problems already.
    """
    values, unread = dict(values), set(unread)
    for kind in FOLDERS:
        before = len(problems)
        values[kind] = _collect(
            problems, lambda k=kind: resolve(values.get(k), kind=k, folder=folder)
        )
        if len(problems) > before:
            unread.add(kind)
        if values[kind] is None:
            del values[kind]
    values = with_stage_defaults(values)
    sections = _parse_sections(values, unread, problems)
    problems += rules.check_sections(sections, world_size=world_size, host=host)
    if problems:
        # Two overrides inside a file that is missing have one and the same problem.
        raise ConfigError(dict.fromkeys(problems), source=source)
    return RunConfig(**sections)


def _parse_sections(
    values: dict[str, Any], unread: set[str], problems: list[str]
) -> dict[str, Any]:
    """The sections that are right; what is wrong with the others joins `problems`.

    A section whose file could not be read (`unread`) has its problem already.
    """
    parsed = parse(RunConfig, values)
    if isinstance(parsed, RunConfig):
        return {name: getattr(parsed, name) for name in RunConfig.model_fields}
    bad = set(unread)
    for problem in parsed:
        name = problem.key.split(".")[0]
        if name not in unread:
            problems.append(problem.text)
            bad.add(name)
    # The other sections are right, so the rules that tie them together can still speak.
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in bad:
            continue
        if name not in values:
            sections[name] = field.get_default()
        else:
            sections[name] = parse_field(RunConfig, name, values[name])
    return sections


def apply_override(
    values: dict[str, Any], override: str, *, folder: Path, kind: type[BaseModel] = RunConfig
) -> None:
    """Set one `key.subkey=value` in `values`, reading a referenced model or data file first.

    `kind` is what `values` are the settings of.
    """
    key, _, text = override.partition("=")
    parts = key.strip().split(".")
    if not all(parts):
        raise ConfigError(f"{override[:200]}: write key.subkey=value, e.g. training.steps=100")
    value = _value(text, parts, kind)
    head = parts[0]
    if len(parts) == 1:
        values[head] = resolve(value, kind=head, folder=Path.cwd()) if head in FOLDERS else value
        return
    if head in FOLDERS:
        values[head] = resolve(values.get(head), kind=head, folder=folder)
    place: Any = values
    for depth, part in enumerate(parts[:-1]):
        place = _step_into(place, part, override, ".".join(parts[:depth]))
    if isinstance(place, list):
        place[_index(place, parts[-1], override, ".".join(parts[:-1]))] = value
    else:
        place[parts[-1]] = value


def _value(text: str, parts: list[str], kind: type[BaseModel]) -> Any:
    """The value of an override. Of a setting that is text, what YAML reserves is text, too."""
    if text.lstrip()[:1] in RESERVED and takes_text(kind, parts):
        return text.strip()
    return parse_yaml(text, source=f"the value of {'.'.join(parts)}")


def _step_into(place: Any, part: str, override: str, where: str) -> Any:
    """The mapping or list at `part` of `place`, made (or copied) so that it can be changed."""
    index: Any = _index(place, part, override, where) if isinstance(place, list) else part
    inside = place[index] if isinstance(place, list) else place.get(part)
    if inside is None:
        inside = {}
    elif isinstance(inside, (dict, list)):
        inside = inside.copy()
    else:
        reached = f"{where}.{part}" if where else part
        raise ConfigError(
            f"{override}: {reached} is {inside!r}, which has no keys inside; set it as a whole: "
            f"{reached}=..."
        )
    place[index] = inside
    return inside


def _index(place: list, part: str, override: str, where: str) -> int:
    allowed = choices(range(len(place))) if place else "none, the list is empty"
    if not (part.isdecimal() and len(part) < 10) or int(part) >= len(place):
        raise ConfigError(
            f"{override}: {where} is a list; {part!r} is not one of its indices: {allowed}"
        )
    return int(part)
