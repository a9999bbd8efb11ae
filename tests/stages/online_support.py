"""Runs on their own answers, at the size of a test: prompts, settings, and what ranks run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.table import STAGE_RANKS
from tests.data.chat.support import write_rows
from tests.support.runs import MODEL, tiny_run

SMALL = {
    **MODEL,
    "layer_pattern": "M|E|+|E",
    "moe": {
        **MODEL["moe"],
        "load_balancing": "none",
        "score_function": "sigmoid",
        "expert_bias": True,
        "expert_bias_update_rate": 0.0,
    },
}
LONGEST = 8  # characters of an answer from which it costs more


def prompt_rows(count: int, seed: int) -> list[dict]:
    """Words to be continued, of which no answer is true."""
    draw = random.Random(seed)
    return [
        {"prompt": "say " + "".join(draw.choices("abcdefgh", k=draw.randint(2, 9))), "truth": n}
        for n in range(count)
    ]


LAYOUTS = {
    "mixed": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "pipeline": {"world_size": 2, "pipeline": 2},
    "virtual": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "data": {"world_size": 2},
}


def prompts_section(data: dict, folder: Path, *, seed: int = 1) -> dict[str, Any]:
    """The `data` section of a run on prompts."""
    files = {
        part: [str(write_rows(folder / f"{part}.jsonl", prompt_rows(count, seed)))]
        for part, count, seed in (("train", 11, seed), ("validation", 3, 2))
    }
    return {
        "type": "prompts",
        "name": "words",
        "tokenizer": data["tokenizer"],
        "template": "plain",
        "sources": [{"name": "made_up", **files}],
        "document_multiple": 4,
    }


def online_run(prompts: dict, weights: Path, output: Path, **changes: Any) -> RunConfig:
    """A short run whose answers are worth more the fewer characters they have."""
    training = {
        "sequence_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "steps": 4,
        "precision": "fp32",
        **changes.pop("training", {}),
    }
    rollout = {"samples_per_prompt": 4, "max_new_tokens": 6, **changes.pop("rollout", {})}
    changes = {
        "stage": "grpo",
        "model": SMALL,
        "objective": {"type": "policy", **changes.pop("objective", {})},
        "parallelism": {"world_size": 1},
        "rewards": [{"type": "length", "unit": "characters", "max_length": 60, "soft_from": 1}],
        **changes,
    }
    checkpoint = {"initial_weights": str(weights), **changes.pop("checkpoint", {})}
    return tiny_run(
        prompts, output, training=training, rollout=rollout, checkpoint=checkpoint, **changes
    )


def reward_model_run(data: dict, weights: Path, folder: Path) -> RunConfig:
    """A short run of stage reward_model into `folder`/run; shorter answers are chosen."""
    words = ["abc", "hello", "a long answer", "no", "perhaps so"]
    rows = [
        {"prompt": f"say {words[n % 5]}", "chosen": words[n % 4][:3], "rejected": words[n % 5] * 2}
        for n in range(12)
    ]
    section = {
        "type": "preferences",
        "name": "pairs",
        "tokenizer": data["tokenizer"],
        "template": "plain",
        "sources": [{"name": "made_up", "train": [str(write_rows(folder / "pairs.jsonl", rows))]}],
        "document_multiple": 4,
    }
    training = {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 4, "steps": 3}
    return tiny_run(
        section,
        folder / "run",
        stage="reward_model",
        model={**SMALL, "head": "scalar"},
        objective={"type": "reward_model"},
        parallelism={"world_size": 1},
        training={**training, "precision": "fp32"},
        checkpoint={"initial_weights": str(weights)},
    )


def stage_rank(rank_info: RankInfo, config: RunConfig) -> None:
    """What `python -m equilibrium_mcore.train` runs in a rank."""
    STAGE_RANKS[config.stage](rank_info, config=config)


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


TIMED = (
    "tokens_per_second",
    "model_tflops_per_device",
    "memory_gib",
    "seconds_per_step",
    "cpu_seconds_per_step",
)


def curve(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records without what the clock and the machine say."""
    return [{k: v for k, v in one.items() if k not in TIMED} for one in records(folder, kind)]


class KilledError(Exception):
    """A run that ends at a place."""


def killed_and_resumed(rank_info: RankInfo, config: RunConfig, place: str) -> int:
    """The run, ended at `place` after the step that made its first rollout, and started again.

    Returns the step at which it went on.
    """
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint, step_of
    from equilibrium_mcore.generation.engine import OwnEngine
    from equilibrium_mcore.online.stream import OnlineStream
    from equilibrium_mcore.optim.optimizer import HybridOptimizer
    from equilibrium_mcore.parallel import process_groups

    owner, name = {
        "generation": (OwnEngine, "_step"),  # of the second rollout, after some of its tokens
        "between": (OnlineStream, "_minibatch"),  # of the third step, after its rollout was made
        "update": (HybridOptimizer, "step"),  # of the third step
    }[place]
    whole, asked = getattr(owner, name), []

    def ends(self: Any, *arguments: Any, **named: Any) -> Any:
        result = None if place == "update" else whole(self, *arguments, **named)
        asked.append(rolling["second"])
        if asked.count(True) == (3 if place == "generation" else 1):
            raise KilledError
        return whole(self, *arguments, **named) if place == "update" else result

    rolling = {"second": False}
    roll_out = OnlineStream._roll_out

    def noted(self: OnlineStream) -> None:
        rolling["second"] = self._run.progress.step > 0
        roll_out(self)

    setattr(owner, name, ends)
    OnlineStream._roll_out = noted
    try:
        STAGE_RANKS[config.stage](RankInfo.alone(), config=config)
        raise AssertionError("it was not killed")
    except KilledError:
        process_groups.destroy()
    finally:
        setattr(owner, name, whole)
        OnlineStream._roll_out = roll_out
    step = step_of(latest_checkpoint(config.output_directory))
    STAGE_RANKS[config.stage](RankInfo.alone(), config=config)
    return step


def kept_bias(rank_info: RankInfo, config: RunConfig) -> list[tuple[list[float], list[float]]]:
    """Biases of the routers before and after the steps, which begin as no zeros."""
    from equilibrium_mcore.online.engine import own_engine
    from equilibrium_mcore.online.setup import go_online
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    go_online(run, own_engine(run))
    biases = [
        buffer
        for chunk in run.chunks
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    ]
    for bias in biases:
        bias.copy_(bias + 0.01 * (1 + bias.new_tensor(range(bias.numel()))))
    before = [bias.tolist() for bias in biases]
    for _ in range(config.training.steps):
        train_step(run)
    after = [bias.tolist() for bias in biases]
    teardown(run)
    return list(zip(before, after, strict=True))


def by_both_engines(rank_info: RankInfo, config: RunConfig, count: int) -> list[Any]:
    """Rollouts of some prompts by the own engine and by the slow one, each token asked again."""
    from equilibrium_mcore.generation.interface import Prompt, Request
    from equilibrium_mcore.online.engine import own_engine
    from equilibrium_mcore.online.rollouts import sampling_of
    from equilibrium_mcore.training.setup import setup, teardown
    from tests.support.slow_engine import SlowEngine

    run = setup(config, rank_info)
    samples = run.datasets.train
    requests = [Request(Prompt.of(samples[n].ids), n) for n in range(count)]
    sampling = sampling_of(config.rollout, samples.stop_ids, seed=1, rollout=0)
    found = [engine.generate(requests, sampling) for engine in (own_engine(run), SlowEngine(run))]
    teardown(run)
    return [[(one.ids.tolist(), one.logprobs.tolist()) for one in rollouts] for rollouts in found]


def shifted_rank(rank_info: RankInfo, config: RunConfig) -> None:
    """The stage by an engine whose log-probabilities are not those of what it drew."""
    from dataclasses import replace

    from equilibrium_mcore.online.engine import own_engine
    from equilibrium_mcore.stages.online import online_rank

    class Shifted:
        def __init__(self, run: Any) -> None:
            self.engine = own_engine(run)

        def generate(self, requests: Any, sampling: Any, *, version: int = 0) -> list[Any]:
            found = self.engine.generate(requests, sampling, version=version)
            return [replace(one, logprobs=one.logprobs - 0.25) for one in found]

    online_rank(rank_info, config=config, engine_of=Shifted)
