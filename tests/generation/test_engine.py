"""The engine on one rank: it says what the model thinks, however the requests are put."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig
from equilibrium_mcore.generation.interface import Prompt, Request, Sampling

LENGTHS = (1, 2, 9, 17, 5, 1)
VOCABULARY = 50
STOPS = (7, 20, 33)
PATTERNS = ("M-", "+E", "*-", "ME+EM-")
TOLERANCE = 1e-4


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [Prompt.of(random.integers(0, VOCABULARY, length)) for length in LENGTHS]
    return [Request(prompt, sample) for prompt in prompts for sample in range(2)]


def sampling(**settings: Any) -> Sampling:
    return Sampling(**{"seed": 3, "max_new_tokens": 15, "stop_ids": STOPS, **settings})


@pytest.fixture
def engine_of(build, single_rank):
    """`engine_of(model, module=None, rows_at_once=4)`: an engine of float32 weights, all random."""
    from equilibrium_mcore.generation.engine import OwnEngine

    def make(model: ModelConfig, module: Any = None, **sizes: int) -> OwnEngine:
        torch.manual_seed(0)  # for weights that no earlier test changes
        module = build(model, dtype=torch.float32) if module is None else module
        return OwnEngine([module], single_rank, model=model, layout=ParallelismConfig(), **sizes)

    return make


def difference_from_the_forward(engine: Any, rollouts: list[Any], temperature: float) -> float:
    """Of log-probabilities, at most, over the support where there is one."""
    worst = 0.0
    for rollout in rollouts:
        prompt = len(rollout.request.prompt.ids)
        ids = np.concatenate([rollout.request.prompt.ids, rollout.ids]).astype(np.int64)
        ids = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = engine.chunks[0](ids, torch.arange(ids.shape[1])[None], None)[0]
        logits = logits[prompt - 1 : -1, :VOCABULARY] / temperature
        if rollout.support is not None:
            outside = torch.ones_like(logits, dtype=torch.bool)
            for position, kept in enumerate(rollout.support):
                outside[position, torch.from_numpy(kept).long()] = False
            assert outside.any()
            logits = logits.masked_fill(outside, -torch.inf)
        values = logits.log_softmax(-1).gather(1, ids[0, prompt:, None])[:, 0]
        worst = max(worst, float((values - torch.from_numpy(rollout.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("pattern", PATTERNS)
def test_trap_log_probabilities_are_the_forward_s(engine_of, small_model, pattern):
    """Also at another temperature, and within a truncated support."""
    engine = engine_of(small_model(pattern))
    for settings in ({}, {"temperature": 0.6}, {"temperature": 0.6, "top_p": 0.9, "top_k": 30}):
        rollouts = engine.generate(requests(), sampling(**settings))
        asked = [(request.prompt.key, request.sample) for request in requests()]
        assert [(r.request.prompt.key, r.request.sample) for r in rollouts] == asked
        assert all((r.support is not None) == ("top_p" in settings) for r in rollouts)
        temperature = settings.get("temperature", 1.0)
        assert difference_from_the_forward(engine, rollouts, temperature) < TOLERANCE


@pytest.mark.parametrize("pattern", ["-E", "ME+EM-", "*-E"])
@pytest.mark.parametrize("shared", [0, 24])
def test_fewer_calls_of_a_step_give_the_same_bits(
    engine_of, small_model, monkeypatch, pattern, shared
):
    """Layers by their parts, against megatron-core's own on the same rows."""
    from equilibrium_mcore.models.decode.stack import DecodingStack, HybridStack

    model = small_model(pattern)
    experts = {"shared_ffn_hidden_size": shared, "score_function": "sigmoid", "expert_bias": True}
    model = model.model_copy(update={"moe": model.moe.model_copy(update=experts)})
    engine, asked = engine_of(model), []
    decode = DecodingStack.decode
    monkeypatch.setattr(DecodingStack, "decode", lambda *given: asked.append(1) or decode(*given))
    found = engine.generate(requests(), sampling())
    assert asked
    monkeypatch.setattr(DecodingStack, "forward", HybridStack.forward)
    plain = engine.generate(requests(), sampling())
    for one, other in zip(found, plain, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_greedy_takes_the_likeliest_of_the_forward(engine_of, small_model):
    engine = engine_of(small_model("ME+EM-"))
    rollouts = engine.generate(requests(), sampling(temperature=0.0))
    assert difference_from_the_forward(engine, rollouts, 1.0) < TOLERANCE
    same = engine.generate(requests(), sampling(temperature=0.0, seed=99, top_p=0.5))
    assert_same(rollouts, same)


def test_trap_an_answer_is_the_same_alone_and_beside_others(engine_of, small_model):
    """In any order, in waves and packs of any size; and the rest of them after a restart."""
    model = small_model("ME+EM-")
    engine = engine_of(model)
    wanted = requests()
    together = engine.generate(wanted, sampling())
    assert len({tuple(rollout.ids) for rollout in together}) > 8
    few = engine_of(model, engine.chunks[0], rows_at_once=3, tokens_at_once=6)
    assert_same(few.generate(wanted[::-1], sampling())[::-1], together)
    torch.manual_seed(17)
    assert_same(few.generate(wanted[5:], sampling()), together[5:])
    for number in (0, 7):
        assert_same(engine.generate(wanted[number : number + 1], sampling()), [together[number]])


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.finish == other.finish
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)


def test_trap_an_answer_keeps_its_stop_id_and_says_how_it_ended(engine_of, small_model):
    rollouts = engine_of(small_model("M-")).generate(requests(), sampling())
    assert {rollout.finish for rollout in rollouts} == {"end", "length"}
    for rollout in rollouts:
        assert not set(STOPS) & set(rollout.ids[:-1].tolist())
        assert (rollout.ids[-1] in STOPS) == (rollout.finish == "end")
        assert len(rollout.ids) == 15 or rollout.finish == "end"
        assert rollout.ids.dtype == np.int32 and rollout.logprobs.dtype == np.float32


def test_nothing_of_the_model_changes(engine_of, small_model):
    model = small_model("ME+E")
    engine = engine_of(
        model.model_copy(
            update={
                "moe": model.moe.model_copy(
                    update={"expert_bias": True, "score_function": "sigmoid"}
                )
            }
        )
    )
    module = engine.chunks[0].train()
    names = dict(module.named_parameters()) | dict(module.named_buffers())
    before = {name: value.detach().clone() for name, value in names.items()}
    state = torch.get_rng_state()
    engine.generate(requests(), sampling(), version=4)
    assert all(torch.equal(names[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and module.post_process
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("experts", [False, True])
def test_trap_adapters_decode_as_if_they_were_merged(
    engine_of, build, small_model, single_rank, experts
):
    from equilibrium_mcore.adapters.lora import adapters_of, attach_adapters, detach_adapters

    model = small_model("ME+EM-")
    module = build(model)  # in float64, in which only a fault is as large as the tolerance
    bare = engine_of(model, module).generate(requests(), sampling())
    settings = LoraConfig(rank=2, experts=experts)
    attach_adapters(module, settings, model=model, groups=single_rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    adapters = adapters_of(module)
    assert any("kv_up" in name for name in adapters)
    for adapter in adapters.values():
        adapter.B.data.normal_(generator=generator).mul_(0.3)
    beside = engine_of(model, module).generate(requests(), sampling())
    assert difference_from_the_forward(engine_of(model, module), beside, 1.0) < TOLERANCE
    for adapter in detach_adapters(module).values():
        adapter.linear.weight.data += adapter.product_here(torch.float64)
    merged = engine_of(model, module).generate(requests(), sampling())
    assert [r.ids.tolist() for r in beside] == [r.ids.tolist() for r in merged]
    assert [r.ids.tolist() for r in beside] != [r.ids.tolist() for r in bare]
    for one, other in zip(beside, merged, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1: it is 0"),
        ({"top_p": 0.0}, "top_p=0: it is more than 0"),
        ({"top_k": -1}, "top_k=-1: it is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it is 1"),
        ({"stop_ids": (50,)}, "stop_ids: 50 is no token"),
    ],
)
def test_what_nothing_can_be_drawn_with_is_refused(engine_of, small_model, settings, message):
    with pytest.raises(ValueError, match=message):
        engine_of(small_model("M-")).generate(requests(), sampling(**settings))


def test_prompts_that_are_none_are_refused(engine_of, small_model):
    engine = engine_of(small_model("M-"))
    for ids, message in (([], "its prompt is empty"), ([3, 50], "ids from 3 to 50")):
        with pytest.raises(ValueError, match=f"request 0: .*{message}"):
            engine.generate([Request(Prompt.of(ids))], sampling())
    assert engine.generate([], sampling()) == []
