"""The settings under which another run's model stands in a run's layout."""

from __future__ import annotations

from pathlib import Path

from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.training.frozen_settings import settings_of_frozen
from tests.stages.online_support import online_run
from tests.support.runs import MODEL, tiny_run


def test_a_frozen_model_may_have_been_balanced_in_every_way(tmp_path):
    """As the quickstart's: nothing of that happens to a teacher or a reference, whose run is RL."""
    prompts = {
        "type": "prompts",
        "name": "words",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "absent.model"},
        "template": "plain",
        "sources": [{"name": "words", "train": ["absent.jsonl"]}],
    }
    balanced = {"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 1e-3}
    model = {**MODEL, "moe": {**MODEL["moe"], **balanced, "z_loss_coefficient": 1e-3}}
    run = online_run(prompts, tmp_path / "weights", tmp_path / "run")
    blend = {
        "name": "blend",
        "tokenizer": prompts["tokenizer"],
        "sources": [{"name": "web", "prefix": "absent", "weight": 1.0}],
    }
    teacher = tiny_run(blend, tmp_path / "teacher", model=model)
    opened = OpenedCheckpoint(Path("teacher"), {}, teacher, None)
    wanted, saved = settings_of_frozen(opened, config=run)
    moe = wanted.model.moe
    assert (moe.load_balancing, moe.z_loss_coefficient, moe.expert_bias_update_rate) == (
        "none",
        0,
        0,
    )
    assert moe.expert_bias  # it was learned, and routes
    assert saved.config.model.moe == teacher.model.moe
