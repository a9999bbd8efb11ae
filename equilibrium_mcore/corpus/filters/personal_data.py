"""Replaces personal data that its form gives away: e-mail and IP addresses, phones, cards.

Each kind has a pattern and a check, so that what only looks alike stays: version numbers, private
networks, documentation addresses, long numbers that no card has. Names and postal addresses are not
looked for; that needs a model. datatrove's formatter is not used: it knows the first two kinds, it
takes turns between replacements, so that a text depends on those before it, and its pattern takes
time that grows with the square of a long run of letters. Here patterns have bounded length.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from equilibrium_mcore.config.filters import PiiRemovalConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped

MIN_PHONE_DIGITS, MAX_PHONE_DIGITS = 8, 15  # 15: ITU-T E.164
MIN_UNGROUPED_PHONE = 11  # characters: a plus sign and ten digits

_LOCAL = r"A-Za-z0-9.!#$%&'*+/=?^_`{|}~\-"
# Not: user@host:path of scp and git, a@b.c( of code.
_EMAIL = re.compile(
    rf"(?<![{_LOCAL}])[{_LOCAL}]{{1,64}}@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{{0,61}}[A-Za-z0-9])?\.)"
    r"{1,8}[A-Za-z]{2,24}\b(?![.\-]?[A-Za-z0-9@]|:[\w~/.]|\()"
)
_RESERVED_DOMAIN = re.compile(  # RFC 2606: nobody's addresses
    r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE
)
# All global IPv6 addresses start with 2 or 3; so no `a::b` of code is one.
_IP_ADDRESS = re.compile(
    r"(?<![\w.\-:])(?:(?:\d{1,3}\.){3}\d{1,3}|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34})"
    r"(?![\w\-]|\.\d|:[0-9A-Fa-f:])"
)
_NUMBERED = re.compile(
    r"(?:versions?|ver\.?|v\.?|releases?|sections?|chapter|build|§)[ :=]{0,2}$", re.IGNORECASE
)
# +CC and a number in groups; or North American with its separators.
_PHONE = re.compile(
    r"(?<![\w+.\-])\+[1-9]\d{0,2}(?:[ .\-/]?\(\d{1,5}\))?(?:[ .\-/]?\d){4,14}(?!\d)"
    r"|(?<![\w+.\-/])\([2-9]\d\d\) ?[2-9]\d\d-\d{4}(?![\w\-]|\.\d)"
    r"|(?<![\w+.\-/])[2-9]\d\d([.\-])[2-9]\d\d\1\d{4}(?![\w\-]|\.\d)"
)
# Digits in one run, or in the groups that cards are printed in.
_CARD = re.compile(
    r"(?<![\w.\-+])(?:[2-6]\d{12,18}"
    r"|[2-6]\d{3}([ \-])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{3})?"
    r"|3\d{3}([ \-])\d{6}\2\d{4,5})(?![\w\-]|\.\d)"
)
# Issuer, the first digits of its cards as ranges, and how many digits they have.
_ISSUERS = (
    ("Visa", (("4", "4"),), (13, 16, 19)),
    ("Mastercard", (("51", "55"), ("2221", "2720")), (16,)),
    ("American Express", (("34", "34"), ("37", "37")), (15,)),
    ("Diners Club", (("300", "305"), ("36", "36"), ("38", "39")), (14,)),
    ("Discover", (("6011", "6011"), ("644", "649"), ("65", "65")), (16, 19)),
    ("JCB", (("3528", "3589"),), (16, 19)),
    ("UnionPay", (("62", "62"),), (16, 17, 18, 19)),
)


class PersonalDataKind(NamedTuple):
    """How a kind of personal data is found, checked and replaced."""

    pattern: re.Pattern[str]
    needed: re.Pattern[str] | str  # text without this cannot hold one; a quick look
    holds: Callable[[re.Match[str]], bool]
    replacement: str


def _is_email(match: re.Match[str]) -> bool:
    domain = match[0].rpartition("@")[2]
    return not _RESERVED_DOMAIN.search(domain)


def _is_public_address(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    before = match.string[max(0, match.start() - 12) : match.start()]
    numbered = _NUMBERED.search(before) or (address.version == 4 and _is_like_a_version(address))
    return address.is_global and not address.is_multicast and not numbered


def _is_like_a_version(address: ipaddress.IPv4Address) -> bool:
    """Four numbers of which the first is small and most are: `1.7.3.3`, `11.8.172.15`.

    So are 7 in 1000 addresses at random, and those of public name servers (`8.8.8.8`).
    """
    numbers = address.packed
    return numbers[0] < 64 and sum(number >= 32 for number in numbers) < 2


def _is_phone(match: re.Match[str]) -> bool:
    text = match[0]
    marks = re.sub(r"[+\d]", "", text)
    if marks == "." or (not marks and len(text) < MIN_UNGROUPED_PHONE):
        return False  # a number with a sign
    return MIN_PHONE_DIGITS <= sum(map(str.isdecimal, text)) <= MAX_PHONE_DIGITS


def _is_card(match: re.Match[str]) -> bool:
    digits = match[0].replace(" ", "").replace("-", "")
    issued = any(
        len(digits) in lengths and any(low <= digits[: len(low)] <= high for low, high in ranges)
        for _, ranges, lengths in _ISSUERS
    )
    return issued and luhn(digits)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


# Cards before phones, so that a card's digits are not taken for a phone. Replacements are from the
# ranges that are reserved for documentation, so that a second pass leaves them alone.
KINDS: dict[str, PersonalDataKind] = {
    "email": PersonalDataKind(_EMAIL, "@", _is_email, "email@example.com"),
    "ip_address": PersonalDataKind(
        _IP_ADDRESS, re.compile(r"\d\.\d|:"), _is_public_address, "192.0.2.1"
    ),
    "credit_card": PersonalDataKind(_CARD, re.compile(r"\d{3}"), _is_card, "[credit card]"),
    "phone": PersonalDataKind(
        _PHONE, re.compile(r"\+\d|\d{3}[.\-]\d{4}"), _is_phone, "[phone number]"
    ),
}


class PersonalDataFilter(DocumentFilter):
    """Puts fixed texts in the place of personal data; drops nothing."""

    name = "pii_removal"

    def __init__(self, config: PiiRemovalConfig) -> None:
        self._kinds = [
            kind._replace(replacement=config.replacements.get(name, kind.replacement))
            for name, kind in KINDS.items()
            if name in config.kinds
        ]

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        for kind in self._kinds:
            if isinstance(kind.needed, str):
                possible = kind.needed in text
            else:
                possible = kind.needed.search(text) is not None
            if possible:
                text = kind.pattern.sub(
                    lambda match, kind=kind: kind.replacement if kind.holds(match) else match[0],
                    text,
                )
        return text
