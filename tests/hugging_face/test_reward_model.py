"""A reward model's folder: transformers loads it as a sequence classifier, with equal scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.hugging_face.convert import export_hugging_face
from equilibrium_mcore.hugging_face.verify import verify_export
from equilibrium_mcore.parallel.launch import RankInfo
from tests.models.test_heads import config_of
from tests.support.runs import VOCABULARY, train_steps

TOLERANCE = 1e-5
SMALL = {"layer_pattern": "M+E", "init_std": 0.1}


def score_and_save(rank_info: RankInfo, config: RunConfig, ids: torch.Tensor) -> torch.Tensor:
    """Two steps of a reward model on made-up pairs; its values of `ids`; a checkpoint."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.scoring import scalar_values
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    if config.model.head == "scalar":
        train_step(run)
        train_step(run)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    values = scalar_values(run, [{"tokens": ids, "labels": ids, "position_ids": positions}])[0]
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)
    return values


@pytest.fixture(scope="module")
def made(ranks, data, tmp_path_factory) -> dict[str, Any]:
    """By name: the run's output directory, and its values of `ids`."""
    folder = tmp_path_factory.mktemp("reward")
    start = folder / "start"
    ranks.run(1, train_steps, config_of(data, start, {}, None, head="output", model=SMALL), 1, True)
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"ids": ids}
    for name in ("whole", "adapters", "both"):
        changes = {"adapters": {"rank": 2}} if name == "adapters" else {}
        head = "both" if name == "both" else "scalar"
        config = config_of(data, folder / name, {}, start, head=head, model=SMALL, **changes)
        found[name] = folder / name, ranks.run(1, score_and_save, config, ids)[0]
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True
    )
    return model.eval()


@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_scores_are_those_of_training(made, tmp_path, name):
    """At every token, and by `logits` at the last."""
    run, expected = made[name]
    export_hugging_face(run, tmp_path / "exported", dtype="float32")
    assert verify_export(run, tmp_path / "exported") < TOLERANCE
    model = loaded(tmp_path / "exported")
    assert model.config.num_labels == 1 and expected.std() > 0.01
    with torch.no_grad():
        found = model.token_scores(made["ids"])
        logits = model(made["ids"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(logits, found[:, -1:])
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card and "reward model" in card


def test_trap_the_score_is_at_the_last_token_wherever_padding_stands(made, tmp_path):
    """Padding is the end token here, which also ends a text: no token id says where that is."""
    run, expected = made["whole"]
    export_hugging_face(run, tmp_path / "exported", dtype="float32")
    model, ids = loaded(tmp_path / "exported"), made["ids"].clone()
    end = model.config.pad_token_id = model.config.eos_token_id
    ids[:, 8:] = end  # the last token of the text and three of padding
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    with torch.no_grad():
        alone = model(ids[:, :9]).logits
        right = model(ids, attention_mask=mask).logits
        left = model(ids.roll(3, 1), attention_mask=mask.roll(3, 1)).logits
        before = model(ids[:, :8]).logits
    torch.testing.assert_close(right, alone, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(left, alone, rtol=0, atol=TOLERANCE)
    assert (before - alone).abs().max() > 1e-3


def test_peft_loads_the_adapters_with_the_head(made, tmp_path):
    from peft import PeftModel

    run, expected = made["adapters"]
    export_hugging_face(run, tmp_path / "exported", dtype="float32", adapters="apart")
    base = loaded(tmp_path / "exported")
    model = PeftModel.from_pretrained(base, tmp_path / "exported" / "adapters").eval()
    with torch.no_grad():
        found = model(made["ids"]).logits
    torch.testing.assert_close(found, expected[:, -1:], rtol=0, atol=TOLERANCE)


def test_a_model_with_both_heads_is_no_class(made, tmp_path):
    with pytest.raises(ValueError, match="model.head='both': no class of transformers"):
        export_hugging_face(made["both"][0], tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
