"""The exported folder: its files, dtypes, shards, and what happens when something is wrong."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.hugging_face.convert import export_hugging_face, find_checkpoint
from equilibrium_mcore.hugging_face.verify import TOLERANCE, verify_export
from tests.hugging_face.conftest import MODELS

ROOT = Path(__file__).parents[2]
KEPT = ("A_log", "mixer.D", "dt_bias", "correction_bias")


def dtypes_in(file: Path) -> dict[str, torch.dtype]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118


def test_bfloat16_keeps_the_small_sensitive_tensors_in_float32(saved, tmp_path):
    done = []
    report = export_hugging_face(
        saved("hybrid").directory,
        tmp_path / "out",
        dtype="bfloat16",
        progress=lambda *counts: done.append(counts),
    )
    found = dtypes_in(tmp_path / "out" / "model.safetensors")
    for name, dtype in found.items():
        assert dtype == (torch.float32 if name.endswith(KEPT) else torch.bfloat16), name
    assert done[-1] == (len(found), len(found))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > report.weights.bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    assert model.model.layers[0].mixer.D.dtype == torch.float32
    with torch.no_grad():
        logits = model(saved("hybrid").ids).logits
    assert (logits - saved("hybrid").logits).abs().mean() < 0.1


def test_shards_hold_at_most_what_is_asked_and_load(saved, exported, tmp_path):
    case = saved("deepseek")
    report = export_hugging_face(
        case.directory, tmp_path / "out", dtype="float32", max_shard_bytes=60_000
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report.weights.files > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"].keys() == dtypes_in(exported("deepseek") / "model.safetensors").keys()
    )
    for file in files:
        assert file.stat().st_size < 60_000 + 10_000 or len(dtypes_in(file)) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(case.ids).logits, case.logits, rtol=0, atol=TOLERANCE)


def test_the_folder_has_what_a_release_needs(saved, exported):
    folder = exported("hybrid")
    assert {path.name for path in folder.iterdir()} == {
        ".equilibrium_mcore.json",
        "README.md",
        "config.json",
        "configuration_equilibrium.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_equilibrium.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    card = (folder / "README.md").read_text()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert "Licence: not chosen" in card and "code: 75.0%" in card and "{" not in card
    assert config.vocab_size == MODELS["hybrid"].vocab_size < MODELS["hybrid"].padded_vocab_size
    assert GenerationConfig.from_pretrained(folder).eos_token_id == config.eos_token_id == 1


def test_saving_and_loading_again_changes_nothing(saved, exported, tmp_path):
    """transformers' own save_pretrained of a loaded model writes the same values."""
    model = AutoModelForCausalLM.from_pretrained(exported("deepseek"), trust_remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(saved("deepseek").ids).logits, model(saved("deepseek").ids).logits)


def test_training_the_exported_model_reaches_every_weight(saved, exported):
    model = AutoModelForCausalLM.from_pretrained(exported("hybrid"), trust_remote_code=True)
    ids = saved("hybrid").ids
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_failed_export_leaves_nothing(saved, tmp_path):
    case = saved("hybrid")
    broken = tmp_path / "step_00000020"
    shutil.copytree(case.directory, broken)
    moe = case.config.model.moe.model_copy(update={"expert_ffn_hidden_size": 20})
    model = case.config.model.model_copy(update={"moe": moe})
    save_config(case.config.model_copy(update={"model": model}), broken / "config.yaml")
    with pytest.raises(ValueError, match=r"gate_up_proj of shape \(8, 48, 48\).*\(8, 40, 48\)"):
        export_hugging_face(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020"]


def test_only_what_an_export_wrote_is_replaced_and_only_when_asked(saved, tmp_path):
    source, out = saved("mamba2").directory, tmp_path / "out"
    for name in ("out.old", "out.partial"):  # the user's
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    export_hugging_face(source, out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_hugging_face(source, out)
    (out / "config.json").write_text("older")
    export_hugging_face(source, out, overwrite=True)
    assert (out / "config.json").read_text() != "older"
    (out / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which was added"):
        export_hugging_face(source, out, overwrite=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out", "out.old", "out.partial"]
    assert (tmp_path / "out.partial" / "mine").exists() and (out / "notes.txt").exists()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_a_checkpoint_and_folders_of_others_are_never_replaced(saved, tmp_path, monkeypatch):
    run = tmp_path / "runs/mine"
    step = run / "checkpoints/step_00000001"
    shutil.copytree(saved("mamba2").directory, step)
    (run / "checkpoints/latest").write_text("step_00000001\n")
    (tmp_path / "other/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "other/checkpoints/step_00000001/state.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(run)
    before = everything_in(tmp_path)
    outputs = {
        run: "is the input",
        Path("."): "is the input",
        Path("../mine"): "is the input",
        tmp_path / "link": "is the input",
        run / "checkpoints": "holds the input",
        step: "lies in the checkpoint",
        step / "hf": "lies in the checkpoint",
        tmp_path / "runs": "holds the input",
        tmp_path / "other": r"no \.equilibrium_mcore\.json",
        tmp_path / "other/checkpoints/step_00000001": r"no \.equilibrium_mcore\.json",
        tmp_path / "file": "is a file",
    }
    for output, message in outputs.items():
        with pytest.raises(FileExistsError, match=message):
            export_hugging_face(run, output, overwrite=True)
    assert everything_in(tmp_path) == before and (tmp_path / "link").is_symlink()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_accepts_a_good_folder_and_refuses_a_bad_one(dtype, saved, tmp_path):
    case = saved("hybrid")
    export_hugging_face(case.directory, tmp_path / "out", dtype=dtype)
    assert verify_export(case.directory, tmp_path / "out") <= TOLERANCE
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["routed_scaling_factor"] = 1.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="computes other logits"):
        verify_export(case.directory, tmp_path / "out")


def run_tool(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
    return exit_.value.code


def test_the_tool_converts_and_verifies(saved, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint", saved("llama").directory, "--output", tmp_path / "out"]
    assert run_tool(monkeypatch, *arguments, "--dtype", "float32", "--verify") == 0
    assert "verified: logits differ" in capsys.readouterr().out
    assert run_tool(monkeypatch, *arguments) == 1
    assert "error:" in capsys.readouterr().err
