"""What `--check` asks beside the rules: everything that would keep the run from starting."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.parallel.launch import MOST_LOCAL_RANKS
from equilibrium_mcore.training.ready import check_ready
from tests.support.attempts import attempt
from tests.support.materials import SMALL, train
from tests.support.runs import tiny_run


@pytest.fixture
def copied(data, tmp_path) -> dict:
    """The data, in a place where it may be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(Path(data["tokenizer"]["model"]).parent, folder)
    tokenizer = {**data["tokenizer"], "model": str(folder / "tokenizer.model")}
    sources = [{**s, "prefix": str(folder / Path(s["prefix"]).name)} for s in data["sources"]]
    return {**data, "tokenizer": tokenizer, "sources": sources}


def problems(config, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        check_ready(config, say=lambda text: None, **options)
    return "\n".join(caught.value.problems)


def test_a_good_run_is_ready_and_nothing_is_written(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", training={"validation_interval_steps": 5})
    check_ready(config)
    check_ready(
        config.model_copy(update={"data": config.data.model_copy(update={"order": "megatron"})})
    )
    assert not (tmp_path / "run").exists()


DAMAGES = {
    "tokenizer.model": (b"\0no model", "is not a SentencePiece model"),
    "first_text_document.idx": (b"MMIDIDX", "is not the index of a Megatron dataset"),
    "second_text_document.bin": (b"", "is cut short"),
    "first_text_document.json": (b"{", "is not a manifest of"),
}


@pytest.mark.parametrize("order", ["ledger", "megatron"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_is_told(copied, tmp_path, name, order):
    content, words = DAMAGES[name]
    (tmp_path / "data" / name).write_bytes(content)
    told = problems(tiny_run({**copied, "order": order}, tmp_path / "run"))
    assert words in told and name.partition(".")[0] in told


@pytest.mark.parametrize("name", ["tokenizer.model", "first_text_document.idx"])
def test_missing_data_is_told_and_left_out_for_another_host(copied, tmp_path, name):
    (tmp_path / "data" / name).unlink()
    config = tiny_run(copied, tmp_path / "run")
    assert "does not exist" in problems(config)
    said = []
    check_ready(config, elsewhere=True, say=said.append)
    assert len(said) == 1 and name in said[0]


@pytest.mark.parametrize("what", ["file", "file/below", "link"])
def test_an_output_directory_that_cannot_be_made(data, tmp_path, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    told = problems(tiny_run(data, tmp_path / what))
    assert f"output_directory='{tmp_path / what}': cannot be made" in told


def test_problems_of_all_kinds_are_told_at_once(copied, data, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_run(
        copied,
        tmp_path / "file",
        model={"vocab_size": 500},
        checkpoint={"initial_weights": str(tmp_path / "nowhere")},
        parallelism={"world_size": MOST_LOCAL_RANKS + 1},
        training={"global_batch_size": MOST_LOCAL_RANKS + 1},
    )
    told = problems(config)
    assert "set model.vocab_size to at least 512" in told
    assert "nowhere: there is no checkpoint" in told
    assert f"output_directory='{tmp_path / 'file'}': cannot be made" in told
    assert f"at most {MOST_LOCAL_RANKS}" in told


@pytest.mark.parametrize("resume", [{"resume": "must"}, {"resume": "must", "resume_step": 7}])
def test_nothing_to_resume(data, tmp_path, resume):
    assert "checkpoint.resume" in problems(tiny_run(data, tmp_path / "run", checkpoint=resume))


def test_patterns_that_match_nothing(data, tmp_path):
    overrides = [{"pattern": "no.such.*", "optimizer": "adamw"}]
    told = problems(tiny_run(data, tmp_path, model=SMALL, optimizer={"overrides": overrides}))
    assert "pattern 'no.such.*' decides no parameter" in told
    told = problems(tiny_run(data, tmp_path, model=SMALL, training={"frozen": ["no.such"]}))
    assert "training.frozen: pattern 'no.such' names no parameter" in told


def test_conversations_that_cannot_be_trained_on(data, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    chats = {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [{"name": "a", "train": [str(tmp_path / "chats.jsonl")]}],
    }
    config = tiny_run(chats, tmp_path / "run", stage="sft", objective={"type": "sft"})
    assert "chats.jsonl, line 1" in problems(config)
    assert not (tmp_path / "run").exists()


def test_check_and_start_agree_over_a_checkpoint(data, tmp_path):
    """Of the command: what is refused by one is refused by the other, in the same words."""
    file, output = tmp_path / "run.yaml", tmp_path / "run"
    config = tiny_run(
        data, output, model=SMALL, training={"stop_after_steps": 1, "global_batch_size": 1}
    )
    save_config(config, file)
    trained = attempt(train, [str(file)])
    assert trained.status == 0, trained.text
    weights = [f"checkpoint.initial_weights={output}", f"output_directory={tmp_path / 'new'}"]
    for words, says in (
        (["model.hidden_size=48"], "model.hidden_size=48 differs from the checkpoint's 32"),
        ([*weights, "model.hidden_size=48"], "model.hidden_size=48 differs from the 32 of the"),
    ):
        checked = attempt(train, [str(file), *words, "--check"])
        started = attempt(train, [str(file), *words])
        assert (checked.status, started.status) == (2, 2), checked.text + started.text
        assert says in checked.text and says in started.text, words
    assert not (tmp_path / "new" / "checkpoints").exists()
    for words in ([], weights):
        done = attempt(train, [str(file), *words, "--check"])
        assert done.status == 0, done.text
