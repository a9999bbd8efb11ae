"""A fine-tuned run as a release: its chat template, its answers, its model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.corpus.special_tokens import add_special_tokens
from equilibrium_mcore.data.chat.build import build_conversations
from equilibrium_mcore.hugging_face.convert import export_hugging_face
from tests.hugging_face.chat_run import ANSWERS, PATTERN, QUESTIONS, chat_run, fine_tune, rows
from tests.hugging_face.test_convert import run_tool

MARK = "<|im_end|>"


@pytest.fixture(scope="module")
def released(fine_tuned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "chat"
    export_hugging_face(fine_tuned.output_directory, folder, dtype="float32")
    return folder


def test_apply_chat_template_gives_the_ids_of_training(fine_tuned, released):
    tokenizer = AutoTokenizer.from_pretrained(released, trust_remote_code=True)
    built = build_conversations(
        fine_tuned.data, sequence_length=64, seed=1, vocab_size=512, samples=1
    )
    trained = [built.dataset.examples[i].ids.tolist() for i in range(len(QUESTIONS))]
    for row, ids in zip(rows(), trained, strict=True):
        assert tokenizer.apply_chat_template(row["messages"], return_dict=False) == ids


def test_the_pipeline_answers_messages(released):
    answer = pipeline(
        "text-generation", model=str(released), trust_remote_code=True, dtype=torch.float32
    )
    for question, expected in ANSWERS.items():
        said = answer([{"role": "user", "content": question}], do_sample=False, max_new_tokens=30)
        assert said[0]["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_an_answer_ends_at_the_end_of_the_turn(released):
    tokenizer = AutoTokenizer.from_pretrained(released)
    stops = GenerationConfig.from_pretrained(released).eos_token_id
    assert tokenizer.convert_tokens_to_ids(MARK) in stops and tokenizer.eos_token_id in stops


def test_the_model_card_tells_of_conversations(fine_tuned, released, tmp_path):
    card = (released / "README.md").read_text()
    for text in ("chat template `chatml`", "- numbers\n", "stage `sft`", "from random weights"):
        assert text in card
    assert "fine-tuned on conversations" in card and "apply_chat_template" in card
    used = card.split("```python")[1].split("```")[0].replace("path/to/this/folder", str(released))
    exec(used, {})  # what a reader would try first


def test_the_model_card_names_what_the_run_started_from(saved, tmp_path):
    case = saved("llama")
    shutil.copytree(case.directory, tmp_path / "step_00000020")
    started = case.config.checkpoint.model_copy(
        update={"initial_weights": tmp_path / "private" / "base"}
    )
    config = case.config.model_copy(update={"checkpoint": started})
    save_config(config, tmp_path / "step_00000020" / "config.yaml")
    export_hugging_face(tmp_path / "step_00000020", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stage `pretrain`, from the weights of `base`" in card and "private" not in card


def test_a_chat_template_is_given_or_withheld(fine_tuned, saved, tmp_path, monkeypatch, capsys):
    plain = ["--checkpoint", saved("llama").directory, "--output", tmp_path / "plain"]
    assert run_tool(monkeypatch, *plain, "--chat-template", "plain") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    asked = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert "User:\n" in text and "Assistant:\n" in text
    silent = ["--checkpoint", fine_tuned.output_directory, "--output", tmp_path / "silent"]
    assert run_tool(monkeypatch, *silent, "--chat-template", "none") == 0
    assert not (tmp_path / "silent" / "chat_template.jinja").exists()
    assert "def fibonacci" in (tmp_path / "silent" / "README.md").read_text()
    missing = ["--checkpoint", fine_tuned.output_directory, "--output", tmp_path / "no"]
    capsys.readouterr()
    assert run_tool(monkeypatch, *missing, "--chat-template", "lama3") == 2
    assert "one of chatml, llama3, plain" in capsys.readouterr().err


def test_a_template_that_the_tokenizer_cannot_write_is_refused(fine_tuned, tmp_path):
    with pytest.raises(ConfigError, match=r"<\|eot_id\|>.*\n.*add_special_tokens"):
        export_hugging_face(fine_tuned.output_directory, tmp_path / "out", chat_template="llama3")
    assert not (tmp_path / "out").exists()


def test_a_template_of_ones_own(fine_tuned, tmp_path):
    from equilibrium_mcore.config.chat import template_named
    from tests.data.chat.test_templates import MARKED

    (tmp_path / "mine.jinja").write_text(MARKED)
    choice = template_named(str(tmp_path / "mine.jinja"))
    export_hugging_face(fine_tuned.output_directory, tmp_path / "out", chat_template=choice)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(said).endswith(MARK)


def test_a_grown_vocabulary_learns_the_template_of_its_new_tokens(
    ranks, data, fine_tuned, tmp_path
):
    """add_special_tokens, initial weights of fewer tokens, fine-tuning, and the release."""
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    old = TokenizerConfig(**{**data["tokenizer"], "model": Path(data["tokenizer"]["model"])})
    added = add_special_tokens(old, tokens, tmp_path / "llama3.model")
    config = chat_run(
        data,
        tmp_path,
        data={
            "template": "llama3",
            "tokenizer": {**data["tokenizer"], "model": str(added.path)},
        },
        model={**PATTERN, "vocab_size": added.vocab_size[1]},
        checkpoint={"initial_weights": str(fine_tuned.output_directory)},
    )
    ranks.run(1, fine_tune, config)
    export_hugging_face(config.output_directory, tmp_path / "out", dtype="float32")
    answer = pipeline(
        "text-generation", model=str(tmp_path / "out"), trust_remote_code=True, dtype=torch.float32
    )
    said = answer([{"role": "user", "content": "two"}], do_sample=False, max_new_tokens=30)
    assert said[0]["generated_text"][-1]["content"] == ANSWERS["two"]
    assert "from the weights of `run`" in (tmp_path / "out" / "README.md").read_text()
