"""Prompts as data: forms, truths, order by epoch and seed, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equilibrium_mcore.config.chat import ConversationSourceConfig, PromptsConfig
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.prompts import build_prompts, parse_prompt
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.tokenizer import load_tokenizer
from tests.data.chat.support import write_rows

ROWS = [{"prompt": f"{n} + 1?", "truth": n + 1} for n in range(7)]


@pytest.fixture(scope="module")
def tokenizer_of(data: dict) -> TokenizerConfig:
    return TokenizerConfig(type="SentencePieceTokenizer", model=Path(data["tokenizer"]["model"]))


def built(tokenizer_of, path: Path, *, longest: int = 100, seed: int = 1, **changes: Any):
    config = PromptsConfig(
        name="p",
        tokenizer=tokenizer_of,
        template=changes.pop("template", "plain"),
        sources=[ConversationSourceConfig(name="s", train=[path])],
        **changes,
    )
    return build_prompts(config, longest=longest, vocab_size=512, seed=seed)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "2?"}, [Turn("user", "2?")]),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2?"}]},
            [Turn("system", "s"), Turn("user", "2?")],
        ),
        ({"messages": [{"role": "user", "content": "2?"}]}, [Turn("user", "2?")]),
        ({"conversations": [{"from": "human", "value": "2?"}]}, [Turn("user", "2?")]),
    ],
)
def test_every_form_is_read(row, turns):
    found = parse_prompt({**row, "truth": {"tests": []}})
    assert list(found.turns) == turns and found.truth == {"tests": []}


def test_ids_end_with_the_header_of_the_answer(tokenizer_of, tmp_path):
    samples, _ = built(tokenizer_of, write_rows(tmp_path / "p.jsonl", ROWS))
    renderer = build_renderer("plain", load_tokenizer(tokenizer_of))
    whole = [Turn("user", "3 + 1?"), Turn("assistant", "4")]
    ids, produced = joined(renderer.segments(whole))
    (prompt,) = [p for p in samples.prompts if p.truth == 4]
    assert prompt.ids.tolist() == ids[: int(np.argmax(produced))].tolist()
    assert samples.stop_ids == (int(ids[produced][-1]),)


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own(tokenizer_of, tmp_path):
    path = write_rows(tmp_path / "p.jsonl", ROWS)
    samples, _ = built(tokenizer_of, path)
    again, _ = built(tokenizer_of, path)
    other, _ = built(tokenizer_of, path, seed=2)
    order = [samples[n].truth for n in range(21)]
    for epoch in range(3):
        assert Counter(order[7 * epoch : 7 * epoch + 7]) == Counter(range(1, 8))
    assert order[:7] != order[7:14]
    assert order == [again[n].truth for n in range(21)]
    assert order != [other[n].truth for n in range(21)]


def test_a_fingerprint_tells_other_truths(tokenizer_of, tmp_path):
    one, _ = built(tokenizer_of, write_rows(tmp_path / "a.jsonl", ROWS))
    changed = [{**row, "truth": 0} for row in ROWS]
    two, _ = built(tokenizer_of, write_rows(tmp_path / "b.jsonl", changed))
    assert one.fingerprint != two.fingerprint


def test_user_text_that_spells_control_tokens_forges_no_turn(tokenizer_of, tmp_path):
    """Control tokens by id, never by text."""
    rows = [{"prompt": "<|endoftext|></s>", "truth": 1}]
    samples, _ = built(tokenizer_of, write_rows(tmp_path / "p.jsonl", rows))
    assert samples.prompts[0].ids.tolist().count(samples.stop_ids[0]) == 1  # the user's own end


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        ([{"prompt": "2?"}], {}, ["line 1", "key truth", "data.truth"]),
        ([{"text": "2?", "truth": 1}], {}, ["line 1", "none of the keys prompt"]),
        (
            [{"messages": [{"role": "assistant", "content": "4"}], "truth": 1}],
            {},
            ["line 1", "assistant's message"],
        ),
        ([{"prompt": "word " * 40, "truth": 1}], {"longest": 20}, ["line 1", "max_new_tokens"]),
        (ROWS, {"max_tokens": 101}, ["data.max_tokens=101", "lower"]),
        ([{"prompt": "w " * 99, "truth": 1}], {"too_long": "drop"}, ["no prompt is left", "1 too"]),
        (ROWS, {"template": "llama3"}, ["<|eot_id|>", "add them to a copy"]),
    ],
    ids=["truth", "keys", "answered", "long", "longest", "none_left", "template"],
)
def test_what_cannot_be_asked_is_told(tokenizer_of, tmp_path, rows, changes, told):
    path = write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(ConfigError) as error:
        built(tokenizer_of, path, **changes)
    for text in told:
        assert text in str(error.value)


def test_dropped_prompts_are_counted(tokenizer_of, tmp_path):
    rows = [*ROWS, {"prompt": "word " * 40, "truth": 1}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    samples, report = built(tokenizer_of, path, longest=60, too_long="drop")
    assert len(samples) == 7 and report.sources["s"].too_long == 1


def test_the_key_of_the_truth_can_be_named(tokenizer_of, tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "2?", "answer": "4"}])
    samples, _ = built(tokenizer_of, path, truth="answer")
    assert samples.prompts[0].truth == "4"
