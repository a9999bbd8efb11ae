"""Filters built from a few words, and documents that the tests of this folder share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from equilibrium_mcore.config.filters import parse_filters
from equilibrium_mcore.corpus.filters.base import FilterChain
from equilibrium_mcore.corpus.filters.build import build_filters

# Six sentences of plain prose, 73 words in four lines, that every set of rules keeps.
PROSE = """\
The river rises in the hills to the north of the town, and it turns west below the old bridge.
In spring the water is high and brown, so that boats have to wait until the flood has passed.
People who live along its banks know the signs. They move their animals to the meadows above.
When summer comes the fields are green again, and nobody speaks of the weeks that went before.
"""


@pytest.fixture(scope="session")
def chain() -> Callable[..., FilterChain]:
    """`chain(type="length", min_length=3)`, or several settings as mappings; built once each."""
    built: dict[str, tuple[FilterChain, object]] = {}  # with the tokenizer, so that its id stays

    def build(*filters: dict, tokenizer=None, **settings) -> FilterChain:
        values = list(filters) or [settings]
        key = json.dumps([values, id(tokenizer)], default=str)
        if key not in built:
            made = build_filters(parse_filters(values), tokenizer=tokenizer)
            built[key] = made, tokenizer
        return built[key][0]

    return build


@pytest.fixture(scope="session")
def reason(chain) -> Callable[..., str | None]:
    """Why one filter drops a text; None when it stays."""

    def ask(text: str, /, **settings) -> str | None:
        outcome = chain(**settings).process(text, {})
        return outcome.dropped.reason if outcome.dropped else None

    return ask


@pytest.fixture(scope="session")
def kept() -> Callable[[FilterChain, list[str]], list[int]]:
    """Which of the texts a chain keeps, as indices."""

    def ask(chain: FilterChain, texts: list[str]) -> list[int]:
        outcomes = chain.resolve([chain.process(text, {}) for text in texts])
        return [number for number, outcome in enumerate(outcomes) if outcome.dropped is None]

    return ask


@pytest.fixture(scope="session")
def stdlib_files(tmp_path_factory, repository) -> dict[str, Path]:
    """Two JSONL files of text that Python ships: documentation, and code with its tables."""
    import runpy

    script = runpy.run_path(str(repository / "examples" / "stdlib_text.py"), run_name="stdlib_text")
    folder = tmp_path_factory.mktemp("stdlib")
    paths = {name: folder / f"{name}.jsonl" for name in ("code", "prose")}
    with contextlib.ExitStack() as stack:
        writers = [
            script["JsonlWriter"](path, stack.enter_context(path.open("wb")), 400_000)
            for path in paths.values()
        ]
        script["write_sources"](Path(json.__file__).parents[1], *writers)
    return paths


@pytest.fixture(scope="session")
def stdlib_texts(stdlib_files) -> dict[str, list[str]]:
    """Their texts."""
    return {
        name: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for name, path in stdlib_files.items()
    }
