"""Memory by role: what is said is what the built models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run

CONFIGS = {"one": {"world_size": 1}, "mixed": {"world_size": 2, "tensor": 2, "expert": 2}}


def built(rank_info: RankInfo, config: Any) -> int:
    """Bytes of this rank's weights."""
    from equilibrium_mcore.parallel import process_groups
    from equilibrium_mcore.training.setup import build_chunks

    groups = process_groups.join(rank_info, config.parallelism, seed=0)
    _, chunks = build_chunks(config, groups, trainable=False)
    size = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    process_groups.destroy()
    return size


@pytest.mark.parametrize("name", CONFIGS)
def test_trap_a_role_has_the_weights_of_its_model(ranks, name):
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()
    from equilibrium_mcore.planning.memory import bytes_of_role

    layout = {**CONFIGS[name], "sequence": name == "mixed"}
    config = tiny_run({"name": "none", "tokenizer": TOKENIZER, "sources": SOURCES}, Path("out"),
                      model=MODEL, parallelism=layout)  # fmt: skip
    found = ranks.run(layout["world_size"], built, config)
    said = bytes_of_role(config, "teacher", config.model)
    # Small parameters of mixers that tensor ranks hold whole are counted as cut.
    assert said == pytest.approx(found[0], rel=0 if name == "one" else 0.05)
    assert bytes_of_role(config, "policy", config.model) == 2 * said  # and a gradient each


TOKENIZER = {"type": "SentencePieceTokenizer", "model": "tokenizer.model"}
SOURCES = [{"name": "a", "prefix": "a", "weight": 1.0}]
