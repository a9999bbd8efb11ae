"""YAML in and out, without YAML 1.1's traps.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, only `true` and `false` are booleans
(so `no` and `on` stay text), dates and `12:30` stay text, and `010` is ten. A key that stands
twice in a mapping is an error; plain PyYAML silently keeps the last.

Any file ends in values or in a ConfigError, within seconds: its size, its depth and the values that
its aliases stand for are bounded, and tags name nothing but plain values.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.paths import what_is_there

MOST_BYTES = 8 << 20  # of a file; a blend of a thousand sources has 0.2 MiB
MOST_VALUES = 200_000  # that it holds, and that its aliases stand for
MOST_LEVELS = 64
MOST_DIGITS = 40  # beyond any range; Python refuses some thousands of digits by itself
_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    yaml.ScalarNode: {f"{_PREFIX}{n}" for n in ("str", "int", "float", "bool", "null", "merge")},
    yaml.SequenceNode: {f"{_PREFIX}seq"},
    yaml.MappingNode: {f"{_PREFIX}map"},
}
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class _PlainEvents(Reader, Scanner, Parser):
    """PyYAML's own parser, where it was built without libyaml, which is several times faster."""

    def __init__(self, stream: str) -> None:
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)


_Events = yaml.cyaml.CParser if yaml.__with_libyaml__ else _PlainEvents


class _RefusedError(yaml.YAMLError):
    """What is YAML, and is not read here."""


class _Loader(Composer, _Events, SafeConstructor, Resolver):  # type: ignore[misc, valid-type]
    """SafeLoader with YAML 1.2's scalars and bounds, which collects keys given twice."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: str) -> None:
        _Events.__init__(self, stream)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self.problems: list[str] = []
        self._levels = self._values = 0
        self._sizes: dict[int, int] = {}  # by node that is whole: the values in it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        line = self.peek_event().start_mark.line + 1
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _RefusedError(f"line {line}: nested more than {MOST_LEVELS} levels deep")
        before, is_alias = self._values, self.check_event(yaml.AliasEvent)
        name = self.peek_event().anchor if is_alias else None
        node = super().compose_node(parent, index)
        self._levels -= 1
        if not is_alias:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        elif id(node) in self._sizes:
            self._values += self._sizes[id(node)]
        else:
            raise _RefusedError(
                f"line {line}: the alias *{name} stands inside what &{name} names, which would "
                "hold itself: write it out"
            )
        if self._values > MOST_VALUES:
            raise _RefusedError(
                f"line {line}: more than {MOST_VALUES:,} values, counting what aliases (*name) "
                "stand for"
            )
        if node.tag not in _PLAIN_TAGS[type(node)]:
            raise _RefusedError(
                f"line {line}: the tag {node.tag.replace(_PREFIX, '!!')[:80]} is not read here: "
                "write plain values, and quote a text that begins with !"
            )
        return node

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        self._sizes.clear()
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, TypeError, AttributeError):
            # Of a tag that is given, e.g. `!!int x`; what is resolved by its form has this form.
            kind = node.tag.removeprefix(_PREFIX)
            line = node.start_mark.line + 1
            self.problems.append(f"line {line}: {str(node.value)[:80]!r} is no {kind}")
            return None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                self.problems.append(
                    f"line {line}: a key must be plain text; found {str(key)[:80]}"
                )
                return {}
            if key in lines:
                self.problems.append(
                    f"line {line}: key {str(key)[:80]!r} is given twice in one mapping (first on "
                    f"line {lines[key]}); keep one of them"
                )
            lines.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > MOST_DIGITS:
        line = node.start_mark.line + 1
        loader.problems.append(
            f"line {line}: the number {text[:20]}... has {len(text):,} digits, and no setting "
            "takes it: quote it if it is text"
        )
        return 0
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which only our reader would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def parse_yaml(text: str, *, source: object) -> Any:
    """The value that `text` holds; ConfigError names `source` when it is not good YAML."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except _RefusedError as error:
        raise ConfigError(str(error), source=source) from None
    except UnicodeEncodeError as error:  # a byte of the command line that is no UTF-8
        raise ConfigError(
            f"not valid YAML: {text[error.start : error.start + 20]!a} is not UTF-8: write it as "
            "UTF-8 text",
            source=source,
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_in_words(error, text)}", source=source) from None
    if loader.problems:
        raise ConfigError(loader.problems, source=source)
    return value


def _in_words(error: yaml.YAMLError, text: str) -> str:
    """A parser's message with its place: `line 3, column 5: found undefined alias 'x'`."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, int) else ord(error.character)
        return f"line {line}: the character U+{character:04X} is not allowed: take it out"
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    what = ", ".join(filter(None, (error.context, error.problem)))
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    return place + what + _hint(what, line)


def _hint(what: str, line: str) -> str:
    """The way out of what people meet most."""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "; the line begins with a tab: indent by spaces"
    if "alias" in what or "found character" in what or "found unknown" in what:
        return '; quote a text that begins with one of * & ! % @ `, e.g. "*-|*-"'
    return ""


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises ConfigError when the file cannot be read, is not YAML, or holds something else.
    """
    value = parse_yaml(_read(path), source=path)
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{path} must hold a mapping of `key: value` lines; it holds {found}")
    return value


def _read(path: Path) -> str:
    """The text of a file of settings. A pipe or a device, which might never end, is none."""
    if (found := what_is_there(path)) is not None:
        raise ConfigError(f"{path}: {found}; name a YAML file")
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(
                f"{path} has more than {MOST_BYTES >> 20} MiB, which no file of settings has: name "
                "another file"
            )
        return content.decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file "
            "as UTF-8 text"
        ) from None


def to_yaml(value: Any) -> str:
    """`value` as YAML text, keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
