"""Adapters in an export: added to the weights, and by themselves as peft loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from equilibrium_mcore.hugging_face.convert import export_hugging_face
from equilibrium_mcore.hugging_face.verify import verify_export
from equilibrium_mcore.parallel.rank_job import RankInfo
from tests.support.runs import MODEL, tiny_run, train_steps

# Every kind of layer that peft can stand beside.
GQA = {
    **MODEL,
    "layer_pattern": "M-*E",
    "mla": None,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16, "qkv_bias": True},
}
MODELS = {"hybrid": {**MODEL, "layer_pattern": "M-+E"}, "gqa": GQA}


def _save_with_large_adapters(rank_info: RankInfo, config) -> None:
    """A checkpoint whose adapters matter: after a step their B would be tiny."""
    from equilibrium_mcore.adapters.lora import adapters_of
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    for adapter in adapters_of(run.chunks[0].module).values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    run.optimizer.refresh_main_weights()
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)


@pytest.fixture(scope="module", params=MODELS)
def tuned(request, ranks, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(f"adapters_{request.param}")
    model = MODELS[request.param]
    ranks.run(1, train_steps, tiny_run(data, folder / "base", model=model), 1, True)
    weights = {"initial_weights": str(folder / "base")}
    config = tiny_run(data, folder / "tuned", model=model, adapters={"rank": 4}, checkpoint=weights)
    ranks.run(1, _save_with_large_adapters, config)
    return folder / "tuned"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % MODEL["vocab_size"]
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=True, dtype=torch.float32
    )


def test_peft_loads_the_adapters_and_computes_what_the_merged_model_does(tuned, tmp_path):
    from peft import PeftModel

    export_hugging_face(tuned, tmp_path / "merged", dtype="float32")
    assert verify_export(tuned, tmp_path / "merged") < 1e-4  # training's own forward
    export_hugging_face(tuned, tmp_path / "apart", dtype="float32", adapters="apart")
    merged, base = logits(load(tmp_path / "merged")), load(tmp_path / "apart")
    plain = logits(base)
    with_adapters = PeftModel.from_pretrained(base, str(tmp_path / "apart" / "adapters"))
    assert torch.allclose(logits(with_adapters), merged, atol=1e-5, rtol=1e-5)
    assert (plain - merged).abs().max() > 1e-2
    settings = json.loads((tmp_path / "apart/adapters/adapter_config.json").read_text())
    linears = {name for name, m in load(tmp_path / "merged").named_modules()
               if isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")}  # fmt: skip
    assert set(settings["target_modules"]) == linears


def test_without_them_it_is_the_base(tuned, tmp_path):
    export_hugging_face(tuned, tmp_path / "left", dtype="float32", adapters="leave_out")
    export_hugging_face(tuned.parent / "base", tmp_path / "base", dtype="float32")
    assert torch.equal(logits(load(tmp_path / "left")), logits(load(tmp_path / "base")))
    assert not (tmp_path / "left" / "adapters").exists()
