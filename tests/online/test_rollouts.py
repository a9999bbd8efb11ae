"""What is asked of an engine: groups, prompts that come twice, dead groups; answers as values."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from equilibrium_mcore.config.online import RolloutConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt, PromptSamples
from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.models.support import SUPPORT
from equilibrium_mcore.online.answers import Answer, batches_of_rank, pack
from equilibrium_mcore.online.experience import SAMPLED, answers_of
from equilibrium_mcore.online.judge import Verdict
from equilibrium_mcore.online.report import figures_of
from equilibrium_mcore.online.rollouts import Gathered, Group, gather, sampling_of


class Echo:
    """Answers with the prompt's first id and the sample's number."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        self.asked += requests
        return [
            Rollout(r, np.array([r.prompt.ids[0], r.sample], np.int32), np.zeros(2), "end", version)
            for r in requests
        ]


class Prompts(PromptSamples):
    """Given ids, in their order, again and again."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.prompts = [EncodedPrompt(np.array([i, 9], np.int32), i, "", "") for i in ids]

    def __getitem__(self, number: int) -> EncodedPrompt:
        return self.prompts[number % len(self.prompts)]


def judge(prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
    """Prompts of an even truth are dead: all answers are worth 1."""
    return [
        Verdict(1.0 if p.truth % 2 == 0 else float(r.request.sample % 2), "ok", {"x": 1.0}, "")
        for p, r in zip(prompts, rollouts, strict=True)
    ]


def gathered(ids: Sequence[int], count: int, **settings: Any) -> tuple[Gathered, Echo]:
    config = RolloutConfig(samples_per_prompt=2, **settings)
    engine = Echo()
    found = gather(
        prompts=Prompts(ids),
        first=0,
        count=count,
        config=config,
        engine=engine,
        sampling=sampling_of(config, (1,), seed=1, rollout=0),
        version=3,
        judge=judge,
    )
    return found, engine


def test_dead_groups_are_replaced_by_further_prompts():
    found, engine = gathered([1, 2, 4, 3, 5, 7], 3, resample=2)
    assert [group.prompt.truth for group in found.groups] == [1, 3, 5]
    assert found.prompts_taken == 5 and len(engine.asked) == 10
    figures = figures_of(found)
    assert figures["dead_groups"] == pytest.approx(2 / 5)
    assert figures["reward"] == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)


def test_a_step_keeps_its_size_where_too_many_groups_are_dead():
    found, _ = gathered([2, 4, 6, 8, 1], 2, resample=1)
    assert [group.prompt.truth for group in found.groups] == [6, 8]


def test_without_resampling_dead_groups_stay():
    found, _ = gathered([1, 2], 2)
    assert [group.prompt.truth for group in found.groups] == [1, 2] and found.prompts_taken == 2


def test_trap_a_prompt_that_comes_twice_gets_other_answers():
    """Noise hangs on ids, prompt and sample: the same number would be the same answer."""
    found, engine = gathered([1, 1, 3], 3)
    assert [request.sample for request in engine.asked] == [0, 1, 2, 3, 0, 1]
    assert len({(r.prompt.key, r.sample) for r in engine.asked}) == 6


def test_every_rollout_has_noise_of_its_own():
    config = RolloutConfig()
    seeds = {sampling_of(config, (1,), seed=s, rollout=r).seed for s in (1, 2) for r in range(3)}
    assert len(seeds) == 6
    assert sampling_of(config, (1,), seed=1, rollout=2) == sampling_of(
        config, (1,), seed=1, rollout=2
    )


def group_of(*verdicts: str, finish: str = "end") -> Group:
    from equilibrium_mcore.generation.interface import Prompt

    prompt = Prompt.of([5, 6, 7])
    rollouts = [
        Rollout(
            Request(prompt, n),
            np.array([8, 9], np.int32),
            np.array([-0.5, -0.25], np.float32),
            finish,
            0,
        )
        for n in range(len(verdicts))
    ]
    judged = [Verdict(float(v == "ok"), v, {"x": 0.0}, "") for v in verdicts]
    return Group(0, EncodedPrompt(prompt.ids, 1, "", ""), rollouts, judged)


def test_trap_failures_of_a_verifier_are_no_zeros():
    """Counted apart, out of the mean and out of the loss."""
    group = group_of("ok", "error", "unparsed", "timeout", "wrong")
    figures = figures_of(Gathered([group], [group], 1))
    assert figures["error"] == figures["unparsed"] == figures["timeout"] == pytest.approx(0.2)
    assert figures["reward"] == pytest.approx(1 / 4)
    assert [a.counts for a in answers_of([group], masked=False)] == [1, 0, 1, 1, 1]


def test_trap_answers_that_were_cut_off_can_be_left_out():
    group = group_of("ok", "wrong", finish="length")
    assert not any(answer.counts for answer in answers_of([group], masked=True))
    assert all(answer.counts for answer in answers_of([group], masked=False))


def test_trap_the_ids_that_were_sampled_are_those_that_train():
    """No text is encoded again: the arrays are the engine's, after the prompt's own."""
    group = group_of("ok")
    (answer,) = answers_of([group], masked=False)
    assert answer.ids.tolist() == [5, 6, 7, 8, 9] and answer.prompt_length == 3
    assert answer.values[SAMPLED].tolist() == [-0.5, -0.25]


def test_trap_what_becomes_experience_is_never_encoded_again():
    """Between the engine and the update stands nothing that could make ids of text."""
    from equilibrium_mcore.online import answers, estimate, experience, rollouts, stream

    for module in (answers, estimate, experience, rollouts, stream):
        source = inspect.getsource(module)
        calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        named = [call for call in calls if isinstance(call, ast.Attribute)]
        texts = (ast.JoinedStr, ast.Constant)  # of which bytes are made, to be hashed
        assert not [c for c in named if c.attr == "encode" and not isinstance(c.value, texts)]
        assert "import Tokenizer" not in source and "load_tokenizer" not in source


def test_trap_each_part_of_a_reward_and_the_length_are_logged():
    """A policy that lives on form, or on length, is seen in its curves."""
    group = group_of("ok", "wrong")
    parts = [{"math": 1.0, "form": 0.5}, {"math": 0.0, "form": 1.0}]
    judged = [v._replace(parts=p) for v, p in zip(group.verdicts, parts, strict=True)]
    group = replace(group, verdicts=judged)
    figures = figures_of(Gathered([group], [group], 1))
    assert figures["reward_math"] == 0.5 and figures["reward_form"] == 0.75
    assert figures["answer_tokens"] == figures["answer_tokens_most"] == 2


def answers(*lengths: tuple[int, int]) -> list[Answer]:
    return [
        Answer(
            np.arange(n * 100, n * 100 + prompt + produced, dtype=np.int32),
            prompt,
            0,
            values={"old": np.arange(produced, dtype=np.float32) + n},
        )
        for n, (prompt, produced) in enumerate(lengths, start=1)
    ]


def test_values_stand_where_their_tokens_are_predicted():
    given = answers((3, 4), (2, 1), (5, 6))
    packed = pack(given, length=16, multiple=4, pad_id=0, at_once=4)
    assert len(packed.sequences) == 4  # filled up
    for answer, place in zip(given, packed.places, strict=True):
        row = packed.sequences[place.sequence]
        here = slice(place.start, place.start + place.length)
        assert row["labels"][here].tolist() == answer.ids[answer.prompt_length :].tolist()
        assert row["old"][here].tolist() == answer.values["old"].tolist()
        assert row["loss_mask"][here].tolist() == [1.0] * answer.length
    counted = sum(float(row["loss_mask"].sum()) for row in packed.sequences)
    assert counted == sum(answer.length for answer in given)


def test_trap_a_support_stands_where_its_token_is_predicted():
    """As the engine gave it, after a checkpoint too; elsewhere there is none."""
    drawn = np.random.default_rng(1)
    given = [
        replace(
            answer,
            support=tuple(
                np.array(sorted({int(i), *drawn.integers(0, 900, drawn.integers(1, 5))}), np.int32)
                for i in answer.ids[answer.prompt_length :]
            ),
        )
        for answer in answers((3, 4), (2, 1), (5, 6))
    ]
    given = [Answer.from_plain(json.loads(json.dumps(answer.as_plain()))) for answer in given]
    packed = pack(given, length=16, multiple=4, pad_id=0, at_once=4)
    (batch,) = batches_of_rank(packed.sequences, size=4, rank=0, ranks=1)
    place = torch.arange(4 * 16).view(4, 16)
    inside = ~batch[SUPPORT].outside(place, first=0, width=900)
    seen = 0
    for answer, (row, start, length) in zip(given, packed.places, strict=True):
        for position, ids in enumerate(answer.support):
            assert inside[row, start + position].nonzero().flatten().tolist() == ids.tolist()
        assert inside[row].gather(1, batch["labels"][row][:, None]).all()
        seen += length
    assert int((~inside.all(-1)).sum()) == seen


def test_data_ranks_have_all_sequences_once():
    packed = pack(answers(*[(3, 9)] * 6), length=16, multiple=1, pad_id=0, at_once=4)
    found = [
        batch["tokens"]
        for rank in range(2)
        for batch in batches_of_rank(packed.sequences, size=2, rank=rank, ranks=2)
    ]
    assert all(tokens.shape == (2, 16) for tokens in found)
    rows = torch.cat(found).tolist()
    assert sorted(rows) == sorted(row["tokens"].tolist() for row in packed.sequences)


def test_answers_survive_a_checkpoint_to_the_bit():
    """Through JSON, as `state.json` keeps them."""
    values = np.random.default_rng(1).normal(size=3).astype(np.float32)
    before = Answer(np.array([1, 2, 3, 4], np.int32), 1, 2, False, {"old": values})
    after = Answer.from_plain(json.loads(json.dumps(before.as_plain())))
    assert after.ids.tolist() == before.ids.tolist() and after.counts is False
    assert after.values["old"].tobytes() == values.tobytes()
    assert (after.prompt_length, after.group) == (1, 2)
