"""Rewards of a user, good and bad, for test_scorer.py."""

from __future__ import annotations

import os
import time


def vowels(*, prompt, text, truth, factor=1.0):
    return factor * sum(letter in "aeiou" for letter in text)


def judged(prompt, text, truth):
    return (1.0, "ok") if text == truth else (0.0, "wrong")


def by_text(*, prompt, text, truth):
    """What the text asks for."""
    if text == "raise":
        raise KeyError("no such poem")
    if text == "die":
        os._exit(7)
    if text == "sleep":
        time.sleep(100_000)
    if text == "spin":
        while True:
            pass
    if text == "print":
        print('{"name": "plugin", "value": 100.0}', flush=True)
    if text == "nan":
        return float("nan")
    return 1.0


def returns_text(*, prompt, text, truth):
    return "good"


def returns_a_strange_verdict(*, prompt, text, truth):
    return 1.0, "fine"


def takes_one(text):
    return 1.0


not_callable = 3
