"""Units that convert to each other exactly, and money; a word that is none is a unit by itself.

A unit is a power product of base units with an exact factor, so 90 km/h is 25 m/s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

# Base unit: (factor to it, names...). Imperial units by their definitions of 1959.
_TABLE: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "m": (
        ("1e-9", ("nm", "nanometer", "nanometre")),
        ("1e-6", ("µm", "μm", "um", "micrometer", "micrometre", "micron")),
        ("1e-3", ("mm", "millimeter", "millimetre")),
        ("1e-2", ("cm", "centimeter", "centimetre")),
        ("1e-1", ("dm", "decimeter", "decimetre")),
        ("1", ("m", "meter", "metre")),
        ("1000", ("km", "kilometer", "kilometre")),
        ("0.0254", ("in", "inch", "inches")),
        ("0.3048", ("ft", "foot", "feet")),
        ("0.9144", ("yd", "yard")),
        ("1609.344", ("mi", "mile")),
    ),
    "g": (
        ("1e-6", ("µg", "μg", "ug", "microgram")),
        ("1e-3", ("mg", "milligram")),
        ("1", ("g", "gram", "gramme")),
        ("1000", ("kg", "kilogram", "kilo")),
        ("1000000", ("t", "tonne")),
        ("453.59237", ("lb", "lbs", "pound")),
        ("28.349523125", ("oz", "ounce")),
    ),
    "s": (
        ("1e-9", ("ns", "nanosecond")),
        ("1e-6", ("µs", "μs", "us", "microsecond")),
        ("1e-3", ("ms", "millisecond")),
        ("1", ("s", "sec", "second")),
        ("60", ("min", "minute")),
        ("3600", ("h", "hr", "hour")),
        ("86400", ("d", "day")),
        ("604800", ("week",)),
    ),
    "USD": (("1", ("$", "USD", "US$", "dollar")), ("1/100", ("¢", "cent"))),
    "EUR": (("1", ("€", "EUR", "euro")),),
    "GBP": (("1", ("£", "GBP")), ("1/100", ("pence",))),
    "JPY": (("1", ("¥", "JPY", "yen")),),
    "°": (("1", ("°", "degree", "deg")),),
    "°C": (("1", ("°C", "celsius")),),
    "°F": (("1", ("°F", "fahrenheit")),),
    "K": (("1", ("K", "kelvin")),),
    "Hz": (("1", ("Hz", "hertz")), ("1000", ("kHz",)), ("1000000", ("MHz",))),
    "J": (("1", ("J", "joule")), ("1000", ("kJ",))),
    "W": (("1", ("W", "watt")), ("1000", ("kW",))),
    "N": (("1", ("N", "newton")),),
    "V": (("1", ("V", "volt")),),
}
# A litre is (0.1 m)^3.
_LITRES = {"l": "1e-3", "L": "1e-3", "liter": "1e-3", "litre": "1e-3", "ml": "1e-6", "mL": "1e-6"}
_LITRES |= {"milliliter": "1e-6", "millilitre": "1e-6", "cl": "1e-5", "dl": "1e-4"}

MONEY_BEFORE = ("US$", "USD", "EUR", "GBP", "JPY", "$", "€", "£", "¥")


@dataclass(frozen=True)
class Unit:
    """A factor and powers of base units, sorted by name: ((name, power), ...)."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]


def _known() -> dict[str, Unit]:
    known = {
        name: Unit(Fraction(factor), ((base, 1),))
        for base, rows in _TABLE.items()
        for factor, names in rows
        for name in names
    }
    known |= {name: Unit(Fraction(f), (("m", 3),)) for name, f in _LITRES.items()}
    return known


_KNOWN = _known()
_FACTOR = re.compile(
    r"(?P<name>[^\W\d_]+|°[CF]?|US\$|[$€£¥¢µ][^\W\d_]*)(?:\^?(?P<power>[-−]?[1-4]))?"
)
_SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3"})
_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def parse_unit(text: str) -> Unit | None:
    """The unit that all of `text` is: `km/h`, `m^2`, `square feet`, `apples`; None if it is none.

    A word that is not in the table is a base unit of its own, without an s for its plural.
    """
    words = text.translate(_SUPERSCRIPTS).strip().rstrip(".").strip()
    words = re.sub(r"\s*(?:\bper\b|/)\s*", "/", words)
    if not words or len(words) > 60:
        return None
    factor, powers = Fraction(1), {}
    for place, part in enumerate(words.split("/")):
        unit = _product(part, _KNOWN)
        if unit is None:
            return None
        sign = -1 if place else 1
        factor *= unit.factor**sign
        for name, power in unit.powers:
            powers[name] = powers.get(name, 0) + sign * power
    return Unit(factor, tuple(sorted((n, p) for n, p in powers.items() if p)))


def is_known(unit: Unit) -> bool:
    """Whether all of a unit is in the table."""
    return all(name in _TABLE for name, _ in unit.powers)


def _product(text: str, known: Mapping[str, Unit]) -> Unit | None:
    """Factors beside each other; words that are none are one name, such as `tennis balls`."""
    raise_next, factor, powers, unknown = 1, Fraction(1), {}, []
    for word in re.split(r"[\s·*]+", text.strip()):
        if word.lower() in _WORDS:
            raise_next = _WORDS[word.lower()]
            continue
        match = _FACTOR.fullmatch(word)
        if not match:
            return None
        power = int((match["power"] or "1").replace("−", "-")) * raise_next
        raise_next = 1
        unit = _look_up(match["name"], known)
        if unit is None:
            if len(match["name"]) < 3:  # a variable, or a product of two
                return None
            unknown.append(_singular(match["name"].lower()))
            continue
        factor *= unit.factor**power
        for name, own in unit.powers:
            powers[name] = powers.get(name, 0) + own * power
    if unknown:
        powers[" ".join(unknown)] = 1
    return Unit(factor, tuple(sorted(powers.items()))) if powers else None


def _look_up(name: str, known: Mapping[str, Unit]) -> Unit | None:
    """By the name itself, and for long names (which have no capital letters) by its singular."""
    if name in known:
        return known[name]
    lower = name.lower()
    for form in (lower, _singular(lower)):
        if len(form) > 2 and form in known:
            return known[form]
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
