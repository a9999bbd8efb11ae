"""Small sources that the tests of the ledger share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.ledger.support import write_source


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Prefixes by name: small, middling, of one document, of lengths far apart, of long ones."""
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(0)
    lengths = {
        "small": [3, 1, 9, 4, 1, 1],
        "middling": generator.integers(1, 60, 300).tolist(),
        "one": [50],
        "mixed": generator.choice([1, 2, 700, 40], 90).tolist(),
        "blocks": generator.integers(1, 3, 2049).tolist(),  # the last block has one document
        "books": generator.integers(600, 3000, 150).tolist(),
    }
    return SimpleNamespace(
        folder=folder,
        prefixes={name: write_source(folder / name, given) for name, given in lengths.items()},
    )
