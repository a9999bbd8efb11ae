"""A pipeline file: steps with a command each, what they read, what they write, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import shipped
from equilibrium_mcore.config.problems import nearest, parse
from equilibrium_mcore.config.section import Section, setting
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.experiments.pipeline_names import References, Value, names_of
from equilibrium_mcore.files.paths import expand_path

_OWN = ("name", "folder")  # variables that every pipeline has


class StepConfig(Section):
    """One step: a command of ours, run when something that it reads has changed."""

    name: str = setting(doc="what other steps and --only call it")
    command: list[str] = setting(
        doc="a tool, e.g. tools/train.py, or -m and a module, then its arguments",
        min_length=1,
    )
    inputs: list[str] = setting(
        [], "files and folders that it reads, beside files named by arguments of the command"
    )
    outputs: dict[str, str] = setting(
        {}, "files and folders that it writes, by the names that other steps use: ${step.name}"
    )


class PipelineConfig(Section):
    """A list of steps. `${name}` in any text is a variable, `${step.output}` what a step wrote."""

    name: str = setting(doc="what the pipeline is called")
    description: str = setting("", "what it makes")
    folder: str = setting(doc="where its outputs and its state go")
    variables: dict[str, Value] = setting(
        {}, "names and their defaults; a list becomes as many arguments of a command"
    )
    steps: list[StepConfig] = setting(doc="the steps", min_length=1)


@dataclass(frozen=True)
class Step:
    """A step with all references replaced. `needs` are the steps whose outputs it reads."""

    name: str
    command: list[str]
    inputs: list[Path]
    outputs: dict[str, Path]
    needs: list[str]


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline: its steps in an order in which each comes after those that it needs."""

    name: str
    folder: Path
    steps: list[Step]

    def step(self, name: str) -> Step:
        """The step of that name. Raises ConfigError with those that there are."""
        for step in self.steps:
            if step.name == name:
                return step
        names = [step.name for step in self.steps]
        raise ConfigError(
            f"step {name}: there is none{nearest(name, names)}; steps are {', '.join(names)}"
        )


def load_pipeline(path: Path, changes: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file, with `variable=value` changes, all checked.

    Raises ConfigError with every problem.
    """
    path = shipped(path)
    if not path.is_file():
        raise ConfigError(
            f"pipeline {path}: no such file, e.g. configs/experiments/full_pipeline.yaml"
        )
    parsed = parse(PipelineConfig, read_mapping(path))
    if isinstance(parsed, list):
        raise ConfigError([problem.text for problem in parsed], source=path)
    problems = list(_bad_names(parsed))
    try:
        own = {"name": parsed.name, "folder": parsed.folder, **parsed.variables}
        places = {
            f"{s.name}.{key}": place for s in parsed.steps for key, place in s.outputs.items()
        }
        names = names_of(own, places, changes)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source=path) from None
    steps = []
    for step in parsed.steps:
        try:
            steps.append(_expanded(step, names))
        except (ConfigError, ValueError) as error:
            found = error.problems if isinstance(error, ConfigError) else [str(error)]
            problems += [f"step {step.name}: {problem}" for problem in found]
    problems += _written_twice(steps)
    if problems:
        raise ConfigError(problems, source=path)
    folder = expand_path(names.text("${folder}"))
    return Pipeline(parsed.name, folder, _in_order(steps, path))


def _places(config: PipelineConfig) -> dict[str, str]:
    """Outputs by `step.output`, as they stand in the file."""
    return {f"{step.name}.{k}": place for step in config.steps for k, place in step.outputs.items()}


def _bad_names(config: PipelineConfig) -> Iterator[str]:
    seen: set[str] = set()
    for step in config.steps:
        if step.name in seen:
            yield f"step {step.name}: there are two of that name; rename one"
        seen.add(step.name)
        if not re.fullmatch(r"[A-Za-z_][\w-]*", step.name):
            yield f"step {step.name!r}: a name has letters, digits, _ and -"
    for name in set(_OWN) & config.variables.keys():
        yield f"variables.{name}: every pipeline has it; choose another name"


def _expanded(step: StepConfig, names: References) -> Step:
    used: list[str] = []
    command = [word for text in step.command for word in names.arguments(text, used)]
    if command[0] != "-m" and not command[0].endswith(".py"):
        raise ConfigError(
            f"command begins with {command[0]!r}: it must be a tool, e.g. tools/train.py, or -m "
            "and a module"
        )
    inputs = [Path(expand_path(w)) for text in step.inputs for w in names.arguments(text, used)]
    outputs = {key: expand_path(names.text(place)) for key, place in step.outputs.items()}
    needs = [name for name in dict.fromkeys(used) if name != step.name]
    return Step(step.name, command, inputs, outputs, needs)


def _written_twice(steps: list[Step]) -> Iterator[str]:
    owner: dict[Path, str] = {}
    for step in steps:
        for key, place in step.outputs.items():
            first = owner.setdefault(place, f"{step.name}.{key}")
            if first != f"{step.name}.{key}":
                yield f"step {step.name}: its output {key} is {place}, as {first} is"


def _in_order(steps: list[Step], path: Path) -> list[Step]:
    """Each after those that it needs, else as in the file."""
    left: Mapping[str, Step] = {step.name: step for step in steps}
    order: list[Step] = []
    while left:
        ready = next((s for s in left.values() if not set(s.needs) & left.keys()), None)
        if ready is None:
            raise ConfigError(f"steps wait for each other: {_circle(left)}", source=path)
        order.append(ready)
        left = {name: step for name, step in left.items() if name != ready.name}
    return order


def _circle(left: Mapping[str, Step]) -> str:
    seen = [next(iter(left))]
    while True:
        needed = next(name for name in left[seen[-1]].needs if name in left)
        if needed in seen:
            return " needs ".join([*seen[seen.index(needed) :], needed])
        seen.append(needed)
