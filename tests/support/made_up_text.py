"""Code that nobody wrote: the same on every machine and after every commit, unlike a real file."""

from __future__ import annotations

import random

WORDS = (
    "the tensor stream layer index value block offset length token name path rank group state step "
    "weight count order source range buffer parse write read merge split open close check find "
    "plan build make of to in from each first last batch sample document epoch shard header "
    "manifest journal cursor gradient momentum router expert attention checkpoint directory error"
).split()
LINES = (
    "{a} = {b}.{c}({d}, {n})",
    "if {a} < {n} and not {b}.{c}:",
    "    return {a}[{n}:{m}] + {b}({c})",
    "for {a}, {b} in zip({c}, {d}, strict=True):",
    "    {a}[{b}] += {n}.{m} * {c}",
    'raise ValueError(f"{{{a}}}: {w} {w2}, at least {n}")',
    "# {w} {w2} {w3}, {w4}: {n} of {m}.",
    "assert {a}.{b} == {{'{c}': {n}, '{d}': [{m}]}}",
    "\twith {a}.{b}('{c}', \"{d}\") as {b}:",
    "",
)


def made_up_code(number: int, seed: int = 0) -> list[str]:
    """So many functions and classes, of 20 to some thousand characters each, no two alike."""
    generator = random.Random(seed)
    return [_definition(generator, place) for place in range(number)]


def _definition(generator: random.Random, place: int) -> str:
    def name() -> str:
        words = "_".join(generator.choices(WORDS, k=generator.choice((1, 1, 2, 3))))
        return words if generator.random() < 0.9 else f"{words}_{place}"

    lines = [f"def {name()}({name()}: int, {name()}: Path | None = None) -> {name()}:"]
    for _ in range(min(220, int(generator.lognormvariate(2.05, 0.95)))):
        words = dict(zip(("w", "w2", "w3", "w4"), generator.choices(WORDS, k=4), strict=True))
        numbers = {"n": generator.randrange(2 ** generator.randrange(1, 20)), "m": place}
        line = generator.choice(LINES).format(
            a=name(), b=name(), c=name(), d=name(), **words, **numbers
        )
        lines.append(f"    {line}".rstrip())
    return "\n".join(lines)
