"""The ladder passes a sound run, and catches and names faults planted one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.parallel import accelerator
from tests.data.chat.support import messages_of, random_chats, write_rows
from tests.support.runs import MODEL, tiny_run

accelerator.quiet_libraries()
accelerator.install()  # before megatron-core is imported

from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from equilibrium_mcore.data.blend import Datasets  # noqa: E402
from equilibrium_mcore.data.ledger.dataset import LedgerDataset  # noqa: E402
from equilibrium_mcore.data.ledger.source import SourceDocuments  # noqa: E402
from equilibrium_mcore.models import mamba, norms  # noqa: E402
from equilibrium_mcore.optim import optimizer as optim_optimizer  # noqa: E402
from equilibrium_mcore.sanity import data_checks, learning_checks  # noqa: E402
from equilibrium_mcore.sanity.ladder import NEEDS_DATA, NEEDS_STEPS, run_ladder  # noqa: E402
from equilibrium_mcore.sanity.workbench import sanity_config  # noqa: E402
from equilibrium_mcore.training import run_data  # noqa: E402
from equilibrium_mcore.training import setup as training_setup  # noqa: E402

ROOT = Path(__file__).parents[2]
ATTENTION = {
    "layer_pattern": "*-",
    "tie_embeddings": True,
    "mla": None,
    "moe": None,
    "mamba": None,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16},
}


def test_a_sound_run_passes_every_check(data, tmp_path):
    report = run_ladder(tiny_run(data, tmp_path))
    assert {c.name: str(c.verdict) for c in report.checks if c.verdict != "PASS"} == {}
    table = report.named("alignment").details
    assert len(table) > 12 and "position" in table[0]
    losses = report.named("overfit").figures["loss"]
    assert losses[-1] < learning_checks.OVERFIT_LOSS < losses[0]
    assert "14 passed, 0 failed" in report.table()
    assert not list(tmp_path.iterdir()), "the ladder leaves nothing in the output directory"


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), pytest.param(3, 8, marks=pytest.mark.slow)])
def test_a_run_of_few_sequences_passes(data, tmp_path, steps, batch):
    """Fewer than the checks read: they take more from the same data."""
    training = {"steps": steps, "global_batch_size": batch, "micro_batch_size": 1}
    schedule = {"kind": "constant", "warmup_steps": 0, "decay_steps": 0}
    config = tiny_run(data, tmp_path, training=training, optimizer={"schedule": schedule})
    report = run_ladder(config)
    assert not report.failed, [check.text() for check in report.failed]
    assert any(f"instead of the run's {steps * batch}" in change for change in report.changes)


def test_attention_with_tied_embeddings_passes(data, tmp_path):
    report = run_ladder(tiny_run(data, tmp_path, model={**MODEL, **ATTENTION}), only=NEEDS_STEPS)
    assert report.named("router").verdict == "SKIPPED"
    assert not report.failed, [check.text() for check in report.failed]


def test_a_large_model_is_shrunk_to_every_kind_of_layer_it_has(data, tmp_path):
    model = {**MODEL, "hidden_size": 512, "layer_pattern": "ME" * 30 + "+E"}
    config = tiny_run(
        data, tmp_path, model=model, parallelism={"world_size": 2, "tensor": 2, "sequence": True}
    )
    small, changes = sanity_config(config, folder=tmp_path)
    assert set(small.model.layer_pattern) == set("ME+")
    assert small.model.vocab_size == config.model.vocab_size
    assert small.parallelism.tensor == 1 and not small.parallelism.sequence
    assert any("twin" in change for change in changes)


# ------------------------------------------------------------------------- faults, one at a time

Plant = Callable[[pytest.MonkeyPatch], Any]


def _samples(change: Callable[[dict, int], Any]) -> Plant:
    """Samples of the dataset go through `change(sample, index)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = LedgerDataset.__getitem__

        def faulty(self, index):
            sample = {name: value.clone() for name, value in sound(self, index).items()}
            change(sample, index)
            return sample

        patch.setattr(LedgerDataset, "__getitem__", faulty)

    return plant


def _wrapped(place: Any, name: str, make: Callable[[Callable], Callable]) -> Plant:
    """`place.name` replaced by `make(it)`."""
    return lambda patch: patch.setattr(place, name, make(getattr(place, name)))


def _built(change: Callable[[torch.nn.Module], Any]) -> Plant:
    """The model, changed after it is built."""

    def make(sound):
        def build(*args, **kwargs):
            module = sound(*args, **kwargs)
            change(module)
            return module

        return build

    return _wrapped(training_setup, "build_model", make)


def _ahead(sound):
    return lambda x, *args, **kwargs: sound(torch.roll(x, -1, dims=1), *args, **kwargs)


def _not_causal(sound):
    return lambda *args, **kwargs: sound(*args, **{**kwargs, "is_causal": False})


def _scan(**changes: Callable):
    """The scan with some of its arguments changed first."""
    names = ("x", "dt", "A", "B", "C")

    def make(sound):
        def scan(*args, **kwargs):
            args = [changes.get(n, lambda t: t)(t) for n, t in zip(names, args, strict=True)]
            return sound(*args, **kwargs)

        return scan

    return make


def _same_experts(sound):
    def gating(self, states):
        logits = sound(self, states)
        return logits + 100.0 * (torch.arange(logits.shape[-1]) < 2)

    return gating


def _dropout(sound):
    return lambda self, x: F.dropout(sound(self, x), 0.1, training=True)


def _shifted_again(sound):
    return lambda self, labels, logits: sound(self, labels.roll(-1, dims=1), logits)


def _without(name: str):
    def make(sound):
        return lambda *args, **kwargs: [
            p for p in sound(*args, **kwargs) if not p.name.endswith(name)
        ]

    return make


def _twice(sound):
    def build(self):
        parameter = next(
            p for p in self._owned if p.name.endswith("layers.0.mixer.out_proj.weight")
        )
        return [
            *sound(self),
            torch.optim.SGD([{"params": [parameter.main], "peak_lr": 0.0}], lr=0.0),
        ]

    return build


def _scaled_output(module):
    module.output_layer.weight.data.mul_(30)


def _frozen(module):
    module.decoder.layers[0].mixer.A_log.requires_grad_(False)


def _no_end(sound):
    return lambda self, span: np.maximum(sound(self, span), 10)


def _no_main_weights(sound):
    def step(self):
        result = sound(self)
        self.refresh_main_weights()  # rounded to the model's precision after every step
        return result

    return step


FAULTS: dict[str, tuple[Plant, str, str]] = {
    "labels not shifted": (
        _samples(lambda s, i: s["labels"].copy_(s["tokens"])), "alignment", "never shifted"),
    "labels shifted twice": (
        _samples(lambda s, i: s["labels"].copy_(s["labels"].roll(-1))), "alignment",
        "shifted twice"),
    "positions from 1": (
        _samples(lambda s, i: s["position_ids"].add_(1)), "alignment", "start at"),
    "labels shifted again in the model": (
        _wrapped(HybridModel, "compute_language_model_loss", _shifted_again), "loss_alignment",
        "shifted again inside the model"),
    "random samples": (
        _samples(lambda s, i: s["tokens"].random_(4, 500)), "data_order", "other tokens"),
    "no end of document": (
        _wrapped(SourceDocuments, "read", _no_end), "batch_statistics", "--append-eod"),
    "attention sees the future": (
        _wrapped(F, "scaled_dot_product_attention", _not_causal), "causality",
        "layer 4 (mla) sees the future"),
    "convolution looks ahead": (
        _wrapped(mamba, "causal_conv", _ahead), "causality", "layer 0 (mamba) sees the future"),
    "scan without its past": (
        _wrapped(mamba, "ssd_scan", _scan(x=torch.zeros_like)), "causality",
        "layer 0 (mamba) sees nothing"),
    "a frozen parameter": (
        _built(_frozen), "gradients", "layers.0.mixer.A_log: frozen"),
    "a detached parameter": (
        _wrapped(mamba, "ssd_scan", _scan(A=torch.Tensor.detach)), "gradients",
        "mixer.A_log: no gradient"),
    "detached rows": (
        _wrapped(mamba, "ssd_scan", _scan(B=torch.Tensor.detach)), "gradients",
        "mixer.in_proj.weight: rows 256 to 319"),
    "a router that never changes its mind": (
        _wrapped(TopKRouter, "gating", _same_experts), "router", "6 of 8 experts got no token"),
    "a parameter that no optimizer has": (
        _wrapped(optim_optimizer, "describe_parameters", _without("layers.0.mixer.D")),
        "optimizer_groups", "layers.0.mixer.D: in no optimizer group"),
    "a parameter that two optimizers have": (
        _wrapped(optim_optimizer.HybridOptimizer, "_build_optimizers", _twice),
        "optimizer_groups", "layers.0.mixer.out_proj.weight: in two optimizer groups"),
    "a rate of zero": (
        _wrapped(optim_optimizer, "learning_rate_factor", lambda sound: lambda *a, **k: 0.0),
        "optimizer_groups", "steps leave it as it was"),
    "an output layer too large": (_built(_scaled_output), "initial_loss", "too large"),
    "dropout in evaluation": (
        _wrapped(norms.RMSNorm, "forward", _dropout), "determinism", "a second evaluation"),
    "no learning": (
        _wrapped(optim_optimizer, "learning_rate_factor", lambda sound: lambda *a, **k: 1e-4),
        "overfit", "keeps it from learning"),
    "no float32 main weights": (
        _wrapped(optim_optimizer.HybridOptimizer, "step", _no_main_weights), "precision",
        "bf16 is"),
    "gradients that are not finite": (
        _wrapped(mamba, "ssd_scan", _scan(x=lambda x: x / 0)), "first_steps", "not finite"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(data, tmp_path, monkeypatch, fault):
    plant, check, words = FAULTS[fault]
    monkeypatch.setattr(learning_checks, "OVERFIT_STEPS", 5)
    plant(monkeypatch)
    only = [check] if check != "first_steps" else ["gradients"]
    report = run_ladder(tiny_run(data, tmp_path), only=only)
    assert [failed.name for failed in report.failed] == [check]
    text = report.named(check).text()
    assert words in text, text


def test_a_start_that_the_config_itself_spoils_is_named(data, tmp_path):
    config = tiny_run(data, tmp_path, model={**MODEL, "init_std": 0.3})
    (check,) = run_ladder(config, only=["initial_loss"]).failed
    assert "model.init_std=0.3" in check.summary


def test_validation_that_was_trained_on_is_named(data, tmp_path):
    report = run_ladder(tiny_run(data, tmp_path), only=["validation_split"])
    assert not report.failed
    datasets = run_data.build_run_datasets(tiny_run(data, tmp_path))
    both = Datasets(datasets.train, datasets.train, None)
    check = data_checks.check_validation_split(both)
    assert check.verdict == "FAIL" and "are in both splits" in check.summary


def test_made_up_tokens_need_no_data(data, tmp_path):
    nowhere = {**data, "sources": [{"name": "x", "prefix": "nowhere/x", "weight": 1.0}]}
    config = tiny_run(nowhere, tmp_path)
    report = run_ladder(config, only=[*NEEDS_DATA, "alignment"], made_up_tokens=True)
    assert {c.name for c in report.checks if c.verdict == "SKIPPED"} == set(NEEDS_DATA)
    assert report.named("alignment").verdict == "PASS"


def test_the_tool_exits_with_1_and_writes_json(data, tmp_path):
    config = tiny_run(data, tmp_path / "run").model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "tools/sanity.py", str(tmp_path / "run.yaml"), "model.init_std=0.3"]
        + ["--only", "schedule", "initial_loss", "--json", str(tmp_path / "out.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "1 passed, 1 failed, 0 skipped" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert not written["passed"]
    assert [c["verdict"] for c in written["checks"]] == ["PASS", "FAIL"]


def fine_tuning(data, tmp_path, *, chats: int):
    """A run of two epochs over made-up conversations, a tenth of them for validation."""
    rows = [{"messages": messages_of(turns)} for turns in random_chats(chats, seed=5)]
    held_out = max(1, chats // 10)
    files = {
        part: [str(write_rows(tmp_path / f"{part}.jsonl", part_rows))]
        for part, part_rows in (("train", rows[held_out:]), ("validation", rows[:held_out]))
    }
    values = {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [{"name": "random", **files}],
        "too_long": "cut",
    }
    return tiny_run(
        values,
        tmp_path / "run",
        stage="sft",
        model={**MODEL, "moe": {**MODEL["moe"], "load_balancing": "none"}},
        training={
            "sequence_length": 128,
            "global_batch_size": 4,
            "precision": "fp32",
            "steps": None,
            "epochs": 2.0,
        },
    )


def test_a_fine_tuning_run_of_few_conversations_passes(data, tmp_path):
    """Their second epoch packs them alike, and the checks read many epochs."""
    wanted = ["batch_statistics", "data_order", "validation_split", "gradients", "precision"]
    report = run_ladder(fine_tuning(data, tmp_path, chats=6), only=wanted)
    assert not report.failed, [check.text() for check in report.failed]


def test_a_fine_tuning_run_by_epochs_is_checked_too(data, tmp_path):
    """Conversations: no end of document, packed, their validation in files of its own."""
    config = fine_tuning(data, tmp_path, chats=200)
    wanted = ["schedule", "batch_statistics", "data_order", "validation_split", "alignment"]
    report = run_ladder(config, only=wanted)
    assert [check.name for check in report.checks] == wanted and not report.failed
    assert not (tmp_path / "run").exists()
    same = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "sources": [
                        config.data.sources[0].model_copy(
                            update={"validation": config.data.sources[0].train}
                        )
                    ]
                }
            )
        }
    )
    (check,) = run_ladder(same, only=["validation_split"]).failed
    assert "are in both splits" in check.summary
