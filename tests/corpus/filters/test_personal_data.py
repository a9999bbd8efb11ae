"""Personal data goes; what only looks alike stays."""

from __future__ import annotations

import time

import pytest

from equilibrium_mcore.corpus.filters.personal_data import KINDS, luhn

MARKS = {name: kind.replacement for name, kind in KINDS.items()}

# The card numbers are the ones that payment companies publish for tests.
GOES = {
    "email": [
        "jane.doe@mail.co.uk",
        "j+list_2@sub.domain.org",
        "O'Brien@firma.de",
        "x@xn--bcher-kva.de",
    ],
    "ip_address": [
        "93.184.5.6",
        "151.101.1.140",
        "45.3.2.77",
        "2001:4860:4860::8888",
        "2a00:1450:4001:81b::200e",
    ],
    "phone": [
        "+49 30 901820",
        "+1 (415) 555-2671",
        "+442079460958",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
    ],
    "credit_card": [
        "4111 1111 1111 1111",
        "4111111111111111",
        "5555-5555-5555-4444",
        "378282246310005",
        "3782 822463 10005",
        "6011000990139424",
    ],
}
STAYS = {
    "email": [
        "jane@example.com",
        "x@test.invalid",
        "git@github.com:owner/name.git",
        "a @ b.c",
        "weights@values.sum()",
        "@decorator.name",
        "react@18.2.0",
        "user@localhost",
    ],
    "ip_address": [
        "192.168.1.1",
        "10.0.0.1",
        "127.0.0.1",
        "version 4.0.30.1",
        "version 93.184.5.6",
        "Section 93.184.5.6",
        "1.7.3.3",
        "11.8.172.15",
        "8.8.8.8",
        "224.0.0.251",
        "93.184.5.6.1",
        "93.184.5.888",
        "12:30:45",
        "std::vector",
        "a::b",
        "2001:db8::1",
    ],
    "phone": [
        "2024-01-02",
        "123-456-7890",
        "+01:00",
        "1+2345678901",
        "+12345678",
        "x = +12",
        "555-2671",
        "978-3-16-148410-0",
        "10.1000/182-555-2671",
        "252.227-7013",
        "+35236450.6",
    ],
    "credit_card": [
        "4111 1111 1111 1112",
        "1234567890123452",
        "41111111 11111111",
        "3.4111111111111111",
        "4111-1111 1111-1111",
        "0000000000000000",
        "1700000000000000",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, chain):
    filters = chain(type="pii_removal", kinds=[kind])
    for text in GOES[kind]:
        for frame in ("{}", "Ask {}, or wait.", "({})", "it is {}.\nNext"):
            wanted = frame.format(MARKS[kind])
            assert filters.process(frame.format(text), {}).text == wanted, text
    for text in STAYS[kind]:
        line = f"See {text} here."
        assert filters.process(line, {}).text == line


def test_all_kinds_at_once_and_again(chain):
    filters = chain(type="pii_removal")
    text = "\n".join(text for texts in GOES.values() for text in texts)
    once = filters.process(text, {}).text
    assert once.splitlines() == [MARKS[kind] for kind, texts in GOES.items() for _ in texts]
    assert filters.process(once, {}).text == once
    untouched = "\n".join(text for texts in STAYS.values() for text in texts)
    assert filters.process(untouched, {}).text == untouched


def test_replacements_are_the_users(chain):
    filters = chain(type="pii_removal", kinds=["email"], replacements={"email": r"<\1mail>"})
    assert filters.process("to a@b.org and c@d.org", {}).text == r"to <\1mail> and <\1mail>"


def test_luhn():
    assert luhn("79927398713") and not any(luhn(f"7992739871{d}") for d in "012456789")


def test_time_grows_with_the_text_alone(chain):
    """Texts that make a careless pattern try every start against every end."""
    filters = chain(type="pii_removal")
    started = time.process_time()
    for piece in ("a/", "aaaa", "a@", "1 ", "1.", "1:", "+1", "4-", "4 4", "a@b.", "a@b-", "2001:"):
        filters.process(piece * (200_000 // len(piece)), {})
    assert time.process_time() - started < 5
