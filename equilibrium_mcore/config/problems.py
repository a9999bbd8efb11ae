"""Checks values against the schema and says in plain words what is wrong with which key."""

from __future__ import annotations

import difflib
import json
import math
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

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
        problems += [_explain(item, kind, key) for item in error.errors(include_url=False)]
        return problems
    return problems or section


def parse_field(kind: type[BaseModel], name: str, value: Any) -> Any:
    """`value` as the field `name` of `kind` holds it; the value must be right."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return TypeAdapter(hint).validate_json(json.dumps(_plain(value, name, [])))


def _plain(value: Any, key: str, problems: list[Problem]) -> Any:
    """`value` with text keys only; what JSON cannot say becomes a problem."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                text = f'{_join(key, name)}: keys must be text; quote it: "{name}"'
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
    key = ".".join(str(part) for part in ([prefix] if prefix else []) + _shown(kind, location))
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
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
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
    return f"{key}.{part}" if key else str(part)


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text) if isinstance(value, str) else text if len(text) < 80 else f"{text[:77]}..."


def _name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a whole number", float: "a fraction"}
    names |= {str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def _length(value: Any) -> object:
    return len(value) if isinstance(value, (list, dict)) else value
