"""The model in memory, gathered tensor by tensor, is its checkpoint's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run

LAYOUTS = {
    "tp2_sp_ep2": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "pp2_vpp2": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "dp2_pp2_tied": {"world_size": 4, "pipeline": 2},
}
MODELS = {
    "dp2_pp2_tied": {"tie_embeddings": True},  # the last stage has a copy of the embedding
}


class Watched:
    """A source that notes what is read of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.read_names = source, []

    def names(self) -> list[str]:
        return self.source.names()

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return self.source.read(name)


def train_and_compare(rank_info: RankInfo, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Names whose live tensors differ from the checkpoint's; folders of both on rank 0."""
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint
    from equilibrium_mcore.hugging_face.convert import write_model
    from equilibrium_mcore.hugging_face.live import LiveTensors
    from equilibrium_mcore.hugging_face.reader import CheckpointReader
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    early = LiveTensors(run.chunks)  # sees the weights at the time of reading
    for _ in range(2):
        train_step(run)
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    reader = CheckpointReader(latest_checkpoint(Path(config.output_directory)))
    outcome: dict[str, Any] = {}
    with run.weights("evaluation") as chunks:
        live = LiveTensors(chunks)
        outcome["names"] = sorted(live.names()) == sorted(reader.names())
        outcome["differ"] = [
            name
            for source in (early, live)
            for name in live.names()
            if not same_bits(source.read(name), reader.read(name))
        ]

        def write(source: Any) -> list[str]:
            for name, of in {"live": Watched(source), "saved": Watched(reader)}.items():
                (folder / name).mkdir(parents=True)
                write_model(folder / name, source=of, config=config, dtype="float32")
            return of.read_names

        outcome["read"] = live.on_first_rank(write)
        with pytest.raises(OSError, match="disk is full"):
            live.on_first_rank(fail_after_a_tensor)
    outcome["current"] = [n for n in reader.names() if not same_bits(early.read(n), reader.read(n))]
    teardown(run)
    return outcome


def fail_after_a_tensor(source: Any) -> None:
    source.read(source.names()[-1])
    raise OSError("the disk is full")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def config_of(data: dict, folder: Path, name: str, **changes: Any) -> RunConfig:
    moe = {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True}
    model = {**MODEL, "moe": moe, **MODELS.get(name, {})}
    return tiny_run(data, folder, model=model, parallelism=LAYOUTS[name], **changes)


def check(ranks: Any, config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """All but whether the current weights are the saved ones too."""
    outcomes = ranks.run(config.parallelism.world_size, train_and_compare, config, folder)
    for outcome in outcomes:
        assert outcome["names"] and outcome["read"]
        assert outcome["differ"] == []
    written = sorted(path.name for path in (folder / "saved").iterdir())
    assert "model.safetensors" in written and "config.json" in written
    assert sorted(path.name for path in (folder / "live").iterdir()) == written
    for name in written:
        live, saved = (folder / kind / name for kind in ("live", "saved"))
        assert live.read_bytes() == saved.read_bytes(), name
    return outcomes


def test_live_tensors_are_the_checkpoints(ranks, data, tmp_path):
    """Of a run that trains in bfloat16 at other weights than it saves."""
    config = config_of(
        data,
        tmp_path / "run",
        "tp2_sp_ep2",
        training={"precision": "bf16"},
        optimizer={"schedule_free": {}, "schedule": {"kind": "constant", "warmup_steps": 2}},
    )
    for outcome in check(ranks, config, tmp_path / "out"):
        assert outcome["current"], "the weights that train were to differ from those that are saved"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tp2_sp_ep2"])
def test_live_tensors_of_pipeline_stages_are_the_checkpoints(ranks, data, tmp_path, name):
    for outcome in check(ranks, config_of(data, tmp_path / "run", name), tmp_path / "out"):
        assert outcome["current"] == []
