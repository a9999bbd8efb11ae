"""Checks values against the schema and says in plain words what is wrong with which key."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "dict_type": "a mapping of `key: value` lines",
    "model_type": "a mapping of `key: value` lines",
    "model_attributes_type": "a mapping of `key: value` lines",
}
_LIMITS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


MOST_EXPLAINED = 60  # of a section's problems; each hint compares with every known name
LONGEST_SHOWN = 80
INTEGERS = range(-(2**63), 2**63)  # what a file of settings, torch and numpy hold


class Problem(NamedTuple):
    """What is wrong with one key."""

    key: str
    text: str


def parse[SectionType: BaseModel](
    kind: type[SectionType], values: Any, *, key: str = ""
) -> SectionType | list[Problem]:
    """`values` as a `kind`, or the list of everything that is wrong with them.

    Validation goes through JSON: there pydantic's strict mode takes text for a path and a whole
    number for a float, but still refuses `true` for a number and text for either.
    """
    problems: list[Problem] = []
    plain = _plain(values, key, problems)
    try:
        section = kind.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        told = {problem.key for problem in problems}  # and have a stand-in here
        explained = [_explain(item, kind, key) for item in errors[:MOST_EXPLAINED]]
        problems += [problem for problem in explained if problem.key not in told]
        return problems + _counted(errors[MOST_EXPLAINED:], key)
    return problems or section


def _counted(errors: list, key: str) -> list[Problem]:
    """A problem for each section with errors that are not explained."""
    counts = Counter(_join(key, next(iter(error["loc"]), "")) for error in errors)
    return [Problem(name, f"{name}: {count:,} more problems") for name, count in counts.items()]


def parse_field(kind: type[BaseModel], name: str, value: Any) -> Any:
    """`value` as the field `name` of `kind` holds it; the value must be right."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return TypeAdapter(hint).validate_json(json.dumps(_plain(value, name, [])))


def _plain(value: Any, key: str, problems: list[Problem]) -> Any:
    """`value` with text keys only; what JSON cannot say becomes a problem."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                text = f'{_join(key, name)}: keys must be text; quote it: "{_shortened(name)}"'
                problems.append(Problem(_join(key, name), text))
        return {
            name: _plain(item, _join(key, name), problems)
            for name, item in value.items()
            if isinstance(name, str)
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, _join(key, i), problems) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem(key, f"{key}={value}: must be a finite number"))
        return 1.0
    if isinstance(value, int) and value not in INTEGERS:
        text = f"{key}={_shortened(value)}: must lie between -2^63 and 2^63 - 1"
        problems.append(Problem(key, text))
        return 1
    if value is None or isinstance(value, (str, int, float)):
        return value
    name = type(value).__name__
    problems.append(
        Problem(key, f"{key}={value!r}: a {name} is not a plain value; write it as text")
    )
    return str(value)


def _explain(error: dict, kind: type[BaseModel], prefix: str) -> Problem:
    """One of pydantic's errors in plain words."""
    location = [part for part in error["loc"] if part != "[key]"]
    shown = map(_shortened, _shown(kind, location))
    key = ".".join([*([prefix] if prefix else []), *shown])
    return Problem(key, _text(error, kind, location, key))


def _text(error: dict, kind: type[BaseModel], location: list, key: str) -> str:
    code, context = error["type"], error.get("ctx", {})
    if code == "extra_forbidden":
        return unknown_key(key, str(location[-1]), _legal_keys(kind, location[:-1]))
    if code in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(key, code, context)
    if code == "value_error":  # one of the schema's own rules, which says it all
        return _own_rule(key, str(context["error"]), error["input"])
    if code == "missing":
        return _missing_key(key, kind, location)
    value = error["input"]
    if code == "literal_error":
        choices = context["expected"]
        hint = nearest(value, choices.replace("'", "").replace(" or ", ", ").split(", "))
        return f"{key}={_show(value)}: must be one of {choices}{hint}"
    if code in _LIMITS:
        name, rule = _LIMITS[code]
        return f"{key}={_show(value)}: {rule} {context[name]}{_meaning(kind, location)}"
    if code == "too_short":
        return f"{key}: needs at least {context['min_length']} item(s); it has {_length(value)}"
    wanted = _WANTED.get(code)
    if wanted is None:
        return f"{key}={_show(value)}: {error['msg']}{_meaning(kind, location)}"
    hint = _type_hint(wanted, value)
    return f"{key}={_show(value)}: must be {wanted}, not {_name(value)}{hint}"


def _own_rule(key: str, message: str, value: Any) -> str:
    """A message of the schema's own; one that begins with the value has the form of the others."""
    rule = message.removeprefix(f"{value}: ")
    return f"{key}: {message}" if rule == message else f"{key}={_show(value)}: {rule}"


def _type_hint(wanted: str, value: Any) -> str:
    if wanted in ("text", "a path"):
        return f'; quote it in YAML: "{_show(value)}"' if isinstance(value, (int, float)) else ""
    if isinstance(value, str) and wanted in ("a number", "a whole number"):
        return "; write it without quotes and without units"
    if isinstance(value, float) and wanted == "a whole number":
        return f"; write {int(value)}" if value.is_integer() else "; round it"
    return ""


def unknown_key(key: str, name: str, allowed: list[str], *, hint: str | None = None) -> str:
    """What is said of a key that is none; `hint` instead of the one that is spelled nearly so."""
    hint = nearest(name, allowed) if hint is None else hint
    return f"{key}: unknown key{hint}; allowed keys here: {', '.join(allowed) or 'none'}"


def _wrong_tag(key: str, code: str, context: dict) -> str:
    """A section that is one of several, and does not say which, or says it wrongly."""
    name = context["discriminator"].strip("'")
    if code == "union_tag_not_found":
        return f"{key}.{name}: missing; it says which kind of section this is"
    choices = context["expected_tags"]
    hint = nearest(context["tag"], choices.replace("'", "").split(", "))
    return f"{key}.{name}={context['tag']!r}: must be one of {choices}{hint}"


def _missing_key(key: str, kind: type[BaseModel], location: list) -> str:
    owner = _section_at(kind, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner else None
    if field is None:
        return f"{key}: missing, and it has no default"
    section = section_of(field.annotation)
    if section is not None:
        needs = [n for n, f in section.model_fields.items() if f.is_required()]
        return f"{key}: missing section; it needs at least {', '.join(needs)}"
    meaning = f" ({field.description})" if field.description else ""
    return f"{key}: missing, and it has no default{meaning}"


def nearest(name: Any, known: list[str]) -> str:
    """`; did you mean ...?` for the known name that looks most like `name`; empty for none."""
    if len(name := str(name)) > LONGEST_SHOWN:  # none is; comparing takes the product of lengths
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _meaning(kind: type[BaseModel], location: list) -> str:
    owner = _section_at(kind, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner and location else None
    return f" ({field.description})" if field is not None and field.description else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `annotation` (`X`, `X | None` or `list[X]`), if there is one.

    Of several, distinguished by a key, it is the first.
    """
    return next(iter(sections_in(annotation)), None)


def takes_text(kind: type[BaseModel], location: list[str]) -> bool:
    """Whether the setting at `location` (keys and indices) is a text, a word or a path.

    Null beside it does not count; what is no setting takes none.
    """
    here: list[Any] = [kind]
    for part in location:
        inside: list[Any] = []
        for option in here:
            if isinstance(option, type) and issubclass(option, BaseModel):
                field = option.model_fields.get(part)
                inside += _options(field.annotation) if field is not None else ()
            elif get_origin(option) is list and part.isdecimal():
                inside += _options(get_args(option)[0])
        here = inside
    texts = [option for option in here if option is not NoneType]
    return bool(texts) and all(
        option in (str, Path) or get_origin(option) is Literal for option in texts
    )


def _options(annotation: Any) -> Iterator[Any]:
    """What a setting may be: the members of a union, without what is annotated to them."""
    if get_origin(annotation) in (UnionType, Union):
        for part in get_args(annotation):
            yield from _options(part)
    elif get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    else:
        yield annotation


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Every section class inside `annotation`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    elif get_origin(annotation) not in (UnionType, Union, list):
        return []
    return [section for part in arguments for section in sections_in(part)]


def _walk(kind: type[BaseModel], location: list) -> tuple[type[BaseModel] | None, list]:
    """The section at `location`, and the parts of `location` that stand in the file.

    Where a section is one of several, pydantic names the chosen one after its place; that name is
    no key of the file.
    """
    here: list[type[BaseModel]] = [kind]
    shown = []
    for part in location:
        if len(here) > 1 and isinstance(part, str):
            here = [section for section in here if _tag(section) == part]
            continue
        shown.append(part)
        if isinstance(part, str):
            fields = here[0].model_fields if here else {}
            here = sections_in(fields[part].annotation) if part in fields else []
    return (here[0] if len(here) == 1 else None), shown


def _tag(section: type[BaseModel]) -> Any:
    """What tells this section from the others of a union: its `type`."""
    field = section.model_fields.get("type")
    return field.default if field is not None else None


def _shown(kind: type[BaseModel], location: list) -> list:
    return _walk(kind, location)[1]


def _section_at(kind: type[BaseModel], location: list) -> type[BaseModel] | None:
    return _walk(kind, location)[0]


def _legal_keys(kind: type[BaseModel], location: list) -> list[str]:
    section = _section_at(kind, location)
    return list(section.model_fields) if section else []


def _join(key: str, part: object) -> str:
    part = _shortened(part)
    return f"{key}.{part}" if key else part


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def _show(value: Any) -> str:
    if not isinstance(value, str):
        return _shortened(json.dumps(value))
    return repr(_shortened(value))


def _name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a whole number", float: "a fraction"}
    names |= {str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def _length(value: Any) -> object:
    return len(value) if isinstance(value, (list, dict)) else value
