"""Writes the tables of settings in the documents from the schema, so that they cannot differ.

`python -m equilibrium_mcore.config.describe` brings the files up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from equilibrium_mcore.config.experiment_keys import KEYS
from equilibrium_mcore.config.filters import FILTER_CLASSES
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.problems import sections_in
from equilibrium_mcore.config.rewards import REWARD_CLASSES, RewardsConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.section import MOST, MOST_FLOAT
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.whole import write_whole

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
DOCUMENT = REFERENCE / "configuration.md"
FILTERS_DOCUMENT = REFERENCE / "filters.md"
REWARDS_DOCUMENT = REFERENCE / "rewards.md"
MIXTURES_DOCUMENT = REFERENCE / "mixtures.md"
EXPERIMENTS_DOCUMENT = REFERENCE / "experiment_files.md"
BEGIN = "<!-- settings: written by equilibrium_mcore/config/describe.py -->"
END = "<!-- end of settings -->"

# Kinds of sections that have a page of their own: reference/filters.md, reference/rewards.md.
OWN_PAGES = [list(FILTER_CLASSES.values()), list(REWARD_CLASSES.values())]
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


def describe(
    kind: type[BaseModel] = RunConfig,
    *,
    key: str = "",
    choice: str = "",
    seen: set[tuple[str, type]] | None = None,
) -> str:
    """Markdown: one table per section, depth first, with key, type, default and meaning.

    `choice` is the section's `type` where several may stand at `key`, or that of the section which
    holds it; `seen` are keys and kinds that have a table already.
    """
    seen = set() if seen is None else seen
    title = (f"### `{key}`" if key else "### A run") + (f", type `{choice}`" if choice else "")
    rows: list[tuple[str, ...]] = []
    inner: list[str] = []
    for name, field in kind.model_fields.items():
        sections = sections_in(field.annotation)
        if sections in OWN_PAGES:
            sections = []
        is_list = get_origin(field.annotation) is list
        place = ".".join(part for part in (key, name) if part) + (".0" if is_list else "")
        meaning = field.description or _first_line(next(iter(sections), None))
        for section in sections:
            own = section.model_fields["type"].default if len(sections) > 1 else choice
            if (place, section) not in seen:
                seen.add((place, section))
                inner.append(describe(section, key=place, choice=own, seen=seen))
        if sections:
            meaning += f" (see `{place}`)"
        rows.append((f"`{name}`", type_text(field), default_text(field), meaning))
    said = " ".join((kind.__doc__ or "").split())
    table = markdown_table(("key", "type", "default", "meaning"), rows)
    return "\n\n".join([title, said, table, *inner])


def describe_filters() -> str:
    """Markdown: one table per document filter, under its `type`."""
    return "\n\n".join(describe(section, key=kind) for kind, section in FILTER_CLASSES.items())


def describe_rewards() -> str:
    """Markdown: one table per reward, under its `type`, then what they share."""
    shared = describe(RewardsConfig, key="the list")
    tables = [describe(section, key=kind) for kind, section in REWARD_CLASSES.items()]
    return "\n\n".join([*tables, shared.replace("### `the list`", "### The list", 1)])


def describe_mixture() -> str:
    """Markdown: the tables of a mixture."""
    return describe(MixtureConfig).replace("### A run", "### A mixture", 1)


def describe_words() -> str:
    """Markdown: the keys of an experiment file, and the settings of a run that each gives."""
    rows = [
        (f"`{key}`", ", ".join(f"`{name}`" for name in entry.settings), entry.meaning)
        for key, entry in KEYS.items()
    ]
    return markdown_table(("key", "settings", "meaning"), rows)


def type_text(field: FieldInfo) -> str:
    """The type and range of a setting, e.g. `integer > 0` or `"cosine", "wsd"`."""
    text = _type_of(field.annotation)
    limits = _limits(field.metadata)
    return f"{text} {limits}" if limits else text


def default_text(field: FieldInfo) -> str:
    """The default as YAML would have it; sections with defaults say so."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value)


def _type_of(annotation: Any) -> str:
    if annotation is Any:
        return "anything plain"
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = _limits(arguments[1:])
        return f"{_type_of(arguments[0])} {limits}".strip()
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (UnionType, Union):
        parts = ("null" if part is NoneType else _type_of(part) for part in arguments)
        return " or ".join(dict.fromkeys(parts))
    if origin is list:
        return f"list of {_type_of(arguments[0])}"
    if origin is dict:
        return f"mapping from {_type_of(arguments[0])} to {_type_of(arguments[1])}"
    return "section"


def _limits(metadata: Any) -> str:
    found = []
    for item in metadata:
        for part in (item, *getattr(item, "metadata", ())):
            for name, sign in _SIGNS.items():
                limit = getattr(part, name, None)
                if limit is not None and limit not in (MOST, MOST_FLOAT):  # said once, above
                    found.append(f"{sign} {limit}")
    return ", ".join(dict.fromkeys(found))


def _first_line(section: type[BaseModel] | None) -> str:
    return (section.__doc__ or "").splitlines()[0] if section is not None else ""


def up_to_date(document: str, settings: Callable[[], str] = describe) -> str:
    """`document` with the settings between its markers rewritten.

    Raises ValueError when it lacks the markers.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{settings()}\n\n{END}{tail}"


def main() -> None:
    """Bring the documents up to date."""
    documents = (
        (DOCUMENT, describe),
        (FILTERS_DOCUMENT, describe_filters),
        (REWARDS_DOCUMENT, describe_rewards),
        (MIXTURES_DOCUMENT, describe_mixture),
        (EXPERIMENTS_DOCUMENT, describe_words),
    )
    for path, settings in documents:
        write_whole(path, up_to_date(path.read_text(encoding="utf-8"), settings))
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
