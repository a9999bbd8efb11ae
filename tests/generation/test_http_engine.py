"""The HTTP engine against a real server of ours: the model's own tokens, and every way to fail."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from equilibrium_mcore.generation.http_engine import HttpEngine, StaleWeightsError
from equilibrium_mcore.generation.interface import Prompt, Request, Rollout, Sampling
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.processes.http_client import Client, ServerError
from tests.generation.http_server import Served, serving
from tests.support.runs import VOCABULARY, tiny_run

GREEDY = Sampling(seed=3, max_new_tokens=6, stop_ids=(2,), temperature=0.0)
# What engines serve: attention and MLPs.
LLAMA: dict[str, Any] = {
    "name": "llama",
    "layer_pattern": "*-|*-",
    "hidden_size": 32,
    "vocab_size": VOCABULARY,
    "vocab_size_multiple": 192,  # the table has rows that pad it
    "init_std": 0.3,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 8},
    "mlp": {"ffn_hidden_size": 48},
}
LAYOUTS = {
    "one": {"world_size": 1},
    "tp2": {"world_size": 2, "tensor": 2, "sequence": True},
    "pp2_dp2": {"world_size": 4, "pipeline": 2},
}


def requests(count: int = 3) -> list[Request]:
    draw = np.random.default_rng(0)
    return [Request(Prompt.of(draw.integers(3, VOCABULARY, 4 + n)), sample=n) for n in range(count)]


def engine_at(url: str, **client: Any) -> HttpEngine:
    client = {"timeout_seconds": 120.0, "attempts": 1, "pause_seconds": 0.0, **client}
    return HttpEngine(Client(url, **client), model="policy", vocab_size=VOCABULARY, connections=2)


def exported_model(config: Any) -> torch.nn.Module:
    """The exported class, of weights that nobody has."""
    from equilibrium_mcore.hugging_face.config_json import config_values
    from equilibrium_mcore.hugging_face.model_code.configuration_equilibrium import (
        EquilibriumConfig,
    )
    from equilibrium_mcore.hugging_face.model_code.modeling_equilibrium import (
        EquilibriumForCausalLM,
    )

    values = config_values(config.model, sequence_length=64)
    return EquilibriumForCausalLM(EquilibriumConfig(**values)).eval()


def ask(rank_info: RankInfo, config: Any, url: str) -> dict[str, Any]:
    """Rollouts after the run's weights were sent, and what training's forward says of them."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.hugging_face.stream import stream_weights
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    engine = engine_at(url)
    with pytest.raises(StaleWeightsError, match="version 0, and version 1 was asked for"):
        engine.generate(requests(), GREEDY, version=1)
    stream_weights(run.chunks, config, engine, version=1)
    found = engine.generate(requests(), GREEDY, version=1)
    scores = []
    for rollout in found:
        whole = np.concatenate([rollout.request.prompt.ids, rollout.ids]).astype(np.int64)
        length = 16
        ids = torch.zeros(1, length + 1, dtype=torch.int64)
        ids[0, : len(whole)] = torch.from_numpy(whole)
        batch = {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],
            "position_ids": torch.arange(length)[None],
        }
        first = len(rollout.request.prompt.ids) - 1
        rest = slice(first, len(whole) - 1)
        of_chosen = log_probabilities(run, [batch])[0][0, rest]
        likeliest = _likeliest(run, batch)[rest] if run.groups.pp.size() == 1 else None
        scores.append((of_chosen.tolist(), likeliest))
    teardown(run)
    return {"rollouts": found, "scores": scores}


def _likeliest(run: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """The likeliest real token after each position, by training's modules."""
    from equilibrium_mcore.models.modes import evaluating

    with torch.no_grad(), evaluating(run.chunks):
        mine = run.chunks[0](batch["tokens"], batch["position_ids"], None)
    slices = [torch.empty_like(mine) for _ in range(run.groups.tp.size())]
    torch.distributed.all_gather(slices, mine.contiguous(), group=run.groups.tp)
    return torch.cat(slices, dim=-1)[0, :, :VOCABULARY].argmax(-1).tolist()


@pytest.mark.parametrize(
    "name", ["tp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("one", "pp2_dp2"))]
)
def test_the_runs_own_greedy_tokens(ranks, data, tmp_path, name):
    """Weights from a layout, padded rows cut off; log p of training's forward."""
    layout = LAYOUTS[name]
    config = tiny_run(data, tmp_path, model=LLAMA, parallelism=layout)
    with serving(Served(exported_model(config))) as url:
        results = ranks.run(layout["world_size"], ask, config, url)
    first = results[0]
    for rollout, (scores, likeliest) in zip(first["rollouts"], first["scores"], strict=True):
        assert rollout.version == 1
        assert likeliest is None or rollout.ids.tolist() == likeliest
        np.testing.assert_allclose(rollout.logprobs, scores, atol=1e-4)
    for other in results[1:]:  # only rank 0 talked
        assert all(map(_same, first["rollouts"], other["rollouts"]))


def _same(one: Rollout, other: Rollout) -> bool:
    return (one.ids == other.ids).all() and (one.logprobs == other.logprobs).all()


@pytest.fixture(scope="module")
def served() -> Served:
    torch.manual_seed(0)
    from equilibrium_mcore.config.schema import ModelConfig

    config = type("Run", (), {"model": ModelConfig(**LLAMA)})
    return Served(exported_model(config))


def test_samples_are_repeated_by_their_seeds(served):
    """The same request, the same answer; another sample of the prompt, another seed."""
    sampling = Sampling(seed=3, max_new_tokens=4, stop_ids=())
    prompt = requests()[0].prompt
    asked = [Request(prompt, 0), Request(prompt, 1)]
    with serving(served) as url:
        first, again = (engine_at(url).generate(asked, sampling) for _ in range(2))
    assert all(map(_same, first, again))
    seeds = [values["seed"] for path, values in served.asked if path == "/v1/completions"]
    assert len({*seeds[-4:]}) == 2
    assert all(rollout.finish == "length" and len(rollout.ids) == 4 for rollout in first)


def test_an_answer_ends_with_its_stop_id(served):
    with serving(served) as url:
        (plain,) = engine_at(url).generate(requests(1), GREEDY)
        stops = Sampling(3, 6, stop_ids=(int(plain.ids[2]),), temperature=0.0)
        (short,) = engine_at(url).generate(requests(1), stops)
    assert short.finish == "end" and short.ids[-1] == plain.ids[2]
    assert short.ids.tolist() == plain.ids[: len(short.ids)].tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [5] * 5}, "5 tokens and 6 log-probabilities"),
        ({"token_ids": []}, "0 tokens, where 1 to 6 were asked for"),
        ({"token_ids": [5] * 7}, "7 tokens, where 1 to 6"),
        ({"token_ids": [VOCABULARY] * 6}, f"ids from {VOCABULARY} to {VOCABULARY}"),
        ({"token_ids": [5, 2, 5, 5, 5, 5]}, "tokens after one that ends an answer"),
        ({"finish_reason": "stop"}, "finish_reason='stop' after 6 of 6 tokens"),
        ({"prompt_token_ids": [1]}, "another prompt's answer"),
        ({"logprobs": {"token_logprobs": [0.5] * 6}}, "log-probabilities that are none"),
        ({"logprobs": None}, "no token ids and log-probabilities"),
        ({"token_ids": None}, "no token ids and log-probabilities"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_answers_to_something_else_are_told(served, change, words):
    def broken(path: str, content: bytes) -> tuple[int, Any]:
        status, values = served(path, content)
        if path == "/v1/completions":
            values["choices"][0].update({"token_ids": [5] * 6, "finish_reason": "length"})
            values["choices"][0]["logprobs"] = {"token_logprobs": [-1.0] * 6}
            values["choices"][0].update(change)
        return status, values

    with serving(broken) as url, pytest.raises(ServerError) as told:
        engine_at(url).generate(requests(1), GREEDY)
    assert words in str(told.value) and url in str(told.value)


def test_a_dead_server_is_told():
    with serving(lambda path, content: (200, {})) as url:
        pass
    with pytest.raises(ServerError, match="could not be asked: .*tried 2 times"):
        engine_at(url, attempts=2).generate(requests(1), GREEDY)


def test_a_slow_server_is_told():
    """It never answers while the test runs."""
    over, seen = threading.Event(), []

    def slow(path: str, content: bytes) -> tuple[int, Any]:
        seen.append(path)
        over.wait()
        return 200, {}

    with serving(slow) as url:
        try:
            with pytest.raises(ServerError, match="did not answer in 0.2 s; tried 2 times"):
                engine_at(url, attempts=2, timeout_seconds=0.2).generate(requests(1), GREEDY)
        finally:
            over.set()
    assert seen == ["/weights/version"] * len(seen)


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(served):
    refusals: list[int] = [503, 429]
    asked: list[str] = []

    def busy(path: str, content: bytes) -> tuple[int, Any]:
        asked.append(path)
        if path == "/v1/completions" and refusals:
            return refusals.pop(0), {"error": "later"}
        return served(path, content)

    with serving(busy) as url:
        assert len(engine_at(url, attempts=3).generate(requests(1), GREEDY)) == 1
        refusals.append(422)
        before = len(asked)
        with pytest.raises(ServerError, match="status 422: .*later"):
            engine_at(url, attempts=3).generate(requests(1), GREEDY)
    assert asked[before:] == ["/weights/version", "/v1/completions"]


def test_what_is_no_engine_is_told():
    page = serving(lambda path, content: (200, b"<html>hello</html>"))
    with page as url, pytest.raises(ServerError, match="no JSON"):
        engine_at(url).generate(requests(1), GREEDY)
    with pytest.raises(ValueError, match="http://"):
        Client("host:8000")


def test_trap_weights_that_change_meanwhile_and_updates_that_were_cut_off_are_refused(served):
    """The version is asked before and after; an update that did not end leaves none."""

    def changing(path: str, content: bytes) -> tuple[int, Any]:
        answer = served(path, content)
        if path == "/v1/completions":
            served.version = 7
        return answer

    with serving(changing) as url:
        engine = engine_at(url)
        with pytest.raises(StaleWeightsError, match="version 7, and version 0"):
            engine.generate(requests(1), GREEDY)
        tensors = [("model.norm.weight", torch.ones(32))]
        with pytest.raises(ServerError, match="status 400: .*missing"):
            engine.send_weights(tensors, version=8)
        with pytest.raises(StaleWeightsError, match="an unfinished update, and version 8"):
            engine.generate(requests(1), GREEDY, version=8)
    served.version = 0


def test_a_support_that_no_server_tells_is_refused():
    for changes in ({"top_k": 5}, {"top_p": 0.9}):
        sampling = Sampling(seed=0, max_new_tokens=2, stop_ids=(), **changes)
        with pytest.raises(ValueError, match="which tokens could be drawn"):
            engine_at("http://127.0.0.1:9").generate(requests(1), sampling)


def fail_together(rank_info: RankInfo, url: str) -> str:
    """What each rank raises of a server that only rank 0 asks."""
    from equilibrium_mcore.config.schema import ParallelismConfig
    from equilibrium_mcore.parallel import process_groups

    process_groups.join(rank_info, ParallelismConfig(tensor=rank_info.world_size), seed=0)
    try:
        engine_at(url).generate(requests(1), GREEDY, version=4)
    except StaleWeightsError as error:
        return str(error)
    finally:
        process_groups.destroy()
    return ""


def test_every_rank_is_told(ranks, served):
    with serving(served) as url:
        told = ranks.run(2, fail_together, url)
    assert "version 4 was asked for" in told[0] and told[0] == told[1]
