"""Rewards together: verdicts and their counts, workers that are killed, errors that stop a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.rewards import (
    ON_RANKS,
    REWARD_CLASSES,
    LengthRewardConfig,
    MathAnswerConfig,
    parse_rewards,
)
from equilibrium_mcore.verification import math_answer
from equilibrium_mcore.verification.form import LengthReward
from equilibrium_mcore.verification.latex import is_installed
from equilibrium_mcore.verification.math_answer import MathAnswer
from equilibrium_mcore.verification.registry import BUILDERS, build_reward
from equilibrium_mcore.verification.scored import Example, RewardError, count_verdicts
from equilibrium_mcore.verification.scorer import Scorer, TooManyErrorsError

PLUGINS = "tests.verification.plugins"
POISON = r"\boxed{5^{5^{5^{5^{5}}}}}"
PATIENCE_SECONDS = 600  # for a hang alone
MATH = {"type": "math_answer", "seconds": 2, "wall_seconds": PATIENCE_SECONDS}
needs_math_verify = pytest.mark.skipif(
    not is_installed(), reason="the extra `verification` is not installed"
)


def plugin(function: str, **settings):
    return {"type": "plugin", "path": f"{PLUGINS}:{function}", **settings}


def scorer(*rewards, **settings) -> Scorer:
    return Scorer(parse_rewards({"rewards": list(rewards), "reward_workers": 1, **settings}))


@pytest.fixture(scope="module")
def several():
    """Three rewards with the workers of all tests that do not need others."""
    rewards = (
        MATH,
        plugin("by_text", seconds=1, wall_seconds=PATIENCE_SECONDS, weight=0.0),
        {"type": "length", "unit": "characters", "max_length": 50, "weight": 0.5},
    )
    with scorer(*rewards, max_error_share=1.0, reward_workers=2) as several:
        yield several


def texts(*answers: str) -> list[Example]:
    return [Example(answer, "5") for answer in answers]


# ----------------------------------------------------------------------------------------- workers


@needs_math_verify
def test_trap_math_verify_hangs_and_the_others_are_scored(several):
    """It has no end for this number, nor for its own timeout."""
    batch = [r"\boxed{5}", POISON, r"\boxed{\sqrt{25}}", r"\boxed{6}", r"\boxed{2+\sqrt{9}}"]
    verdicts = [one.verdict for one in several.score(texts(*batch))]
    assert verdicts == ["ok", "timeout", "ok", "wrong", "ok"]
    again = several.score(texts(*[r"\boxed{\sqrt{25}}"] * 3))  # by the worker that is new, too
    assert [one.verdict for one in again] == ["ok"] * 3


@needs_math_verify
def test_trap_math_verify_outside_of_the_main_thread(several):
    """There its alarm raises; ours is no alarm."""
    found = []

    def work() -> None:
        found.extend(several.score(texts(r"\boxed{\sqrt{25}}")))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [one.verdict for one in found] == ["ok"]


def test_a_plugin_that_waits_is_killed_by_the_clock():
    with scorer(plugin("by_text", wall_seconds=1)) as ours:
        assert [one.verdict for one in ours.score([Example("sleep")])] == ["timeout"]


def test_a_plugin_that_computes_for_ever_dies_or_prints(several):
    kinds = ["spin", "die", "raise", "nan", "print", "fine"]
    scored = several.score([Example(f"{kind}", "5") for kind in kinds])
    parts = {kind: one.details["plugin"] for kind, one in zip(kinds, scored, strict=True)}
    assert {kind: part.verdict for kind, part in parts.items()} == {
        "spin": "timeout", "die": "error", "raise": "error", "nan": "error",
        "print": None, "fine": None,
    }  # fmt: skip
    assert "status 7" in parts["die"].reason and "KeyError" in parts["raise"].reason
    assert parts["print"].value == parts["fine"].value == 1.0


def test_the_order_is_that_of_the_examples(several):
    numbers = [str(n % 7) for n in range(60)]
    scored = several.score([Example(rf"\boxed{{{n}}}", "3", key=n) for n in numbers])
    assert [one.example.key for one in scored] == numbers
    assert [one.answer_text for one in scored] == numbers
    assert [one.parts["math_answer"] for one in scored] == [float(n == "3") for n in numbers]


# ---------------------------------------------------------------------------------------- verdicts


def test_the_reward_is_the_weighted_sum(several):
    (one, long) = several.score(texts(r"\boxed{5}", r"\boxed{5}" + " " * 60))
    assert one.parts == {"math_answer": 1.0, "plugin": 1.0, "length": 0.0} and one.reward == 1.0
    assert long.parts["length"] == -1.0 and long.reward == 0.5


def test_trap_failures_are_counted_apart_from_wrong(several):
    batch = [
        *texts(r"\boxed{5}", r"\boxed{6}", "no answer", "raise"),
        Example(r"\boxed{5}", None),
        Example(r"\boxed{5}", ["5"]),
    ]
    scored = several.score(batch)
    assert [one.details["math_answer"].verdict for one in scored] == [
        "ok", "wrong", "unparsed", "unparsed", "error", "error",
    ]  # fmt: skip
    counts = count_verdicts(scored)
    assert counts["math_answer"] == {"ok": 1, "wrong": 1, "unparsed": 2, "error": 2}
    assert counts["plugin"] == {"error": 1}
    assert counts["all"] == {"ok": 1, "wrong": 1, "unparsed": 1, "error": 3}
    assert scored[4].reward == 0.0 and "truth" in scored[4].details["math_answer"].reason


def test_trap_too_many_errors_stop_and_name_the_examples():
    with scorer(plugin("by_text", name="poems")) as ours:
        processes = [worker.process for worker in ours._pool._workers]
        assert [process.poll() for process in processes] == [None]
        batch = [Example("fine", key=f"number-{n}") for n in range(100)]
        for place in (3, 50):
            batch[place] = Example("raise", key=f"number-{place}")
        assert len(ours.score(batch)) == 100  # 2 of 100 are not more than 2%
        with pytest.raises(TooManyErrorsError) as stop:
            ours.score([Example("raise", key="the-third"), *batch[:49]])
        for word in ("example 100 (the-third)", "poems", "KeyError", "max_error_share=0.02"):
            assert word in str(stop.value)
        assert len(stop.value.scored) == 50 and stop.value.scored[1].verdict == "ok"
    assert None not in [process.poll() for process in processes]  # they end with the scorer


def test_plugins_give_verdicts_and_take_arguments():
    rewards = plugin("judged"), plugin("vowels", name="v", arguments={"factor": 0.5}, weight=2.0)
    with scorer(*rewards) as ours:
        scored = ours.score([Example("a", "a"), Example("aeio", "b")])
    assert [(one.verdict, one.reward) for one in scored] == [("ok", 2.0), ("wrong", 4.0)]
    assert scored[1].parts == {"plugin": 0.0, "v": 2.0}


# --------------------------------------------------------------------------- plug-ins that are none


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (f"{PLUGINS}:absent", r"absent is not there in .*its functions: vowels"),
        (f"{PLUGINS}:not_callable", "not_callable is not callable"),
        (f"{PLUGINS}:takes_one", r"takes_one\(text\) cannot be called with prompt, text, truth"),
        ("no_such_module_here:reward", "ModuleNotFoundError.*PYTHONPATH"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told(function, told):
    (config,) = parse_rewards([{"type": "plugin", "path": function}]).rewards
    with pytest.raises(RewardError, match=f"(?s){told}"):
        build_reward(config)


def test_what_a_worker_cannot_do_is_told_at_the_start():
    with pytest.raises(ConfigError, match="rewards: .*absent is not there"):
        scorer(plugin("absent"))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("returns_text", r"returned 'good' \(str\); it must be: def reward"),
        ("returns_a_strange_verdict", "returned the verdict 'fine'; there are ok, wrong"),
    ],
)
def test_a_plugin_that_returns_something_else(function, told):
    (config,) = parse_rewards([plugin(function)]).rewards
    with pytest.raises(RewardError, match=told):
        build_reward(config).score(Example("x"))


def test_what_a_plugin_must_not_return_stops_at_once():
    with scorer(plugin("returns_text")) as ours, pytest.raises(RewardError, match="'good'"):
        ours.score([Example("x")])


# ---------------------------------------------------------------------------------- format, length


def form(text: str, **settings) -> float:
    (config,) = parse_rewards([{"type": "format", **settings}]).rewards
    return build_reward(config).score(Example(text)).value


@pytest.mark.parametrize(
    ("text", "settings", "value"),
    [
        ("<think>a</think><answer>5</answer>", {}, 1.0),
        ("\n<think>a\nb</think>\n\n<answer>5</answer>\n", {}, 1.0),
        ("<answer>5</answer><think>a</think>", {}, 0.0),
        ("<think>a</think>", {}, 0.0),
        ("<think>a<answer>5</answer></think>", {}, 0.0),
        ("<think>a</think><answer>5</answer><answer>6</answer>", {}, 0.0),
        ("<think></think><answer>5</answer>", {}, 0.0),
        ("<think>a</think>so<answer>5</answer>", {}, 0.0),
        ("<think>a</think>so<answer>5</answer>", {"text_outside": True}, 1.0),
        ("a</think><answer>5</answer>", {"first_is_open": True}, 1.0),
        ("<think>a</think><answer>5</answer>", {"first_is_open": True}, 0.0),
        ("<final>5</final>", {"tags": ["final"]}, 1.0),
        ("", {}, 0.0),
    ],
)
def test_format(text, settings, value):
    assert form(text, **settings) == value


def test_length_is_daos_soft_penalty():
    """R = 0, then (L_max - L_cache - L) / L_cache, then -1: arXiv 2503.14476, equation 13."""
    most, cache = 100, 40
    reward = LengthReward(LengthRewardConfig(max_length=most, soft_from=most - cache))
    for length in range(0, 140, 7):
        want = 0.0 if length <= most - cache else (most - cache - length) / cache
        assert reward.value(length) == max(-1.0, want)
    step = LengthReward(LengthRewardConfig(max_length=most))
    assert [step.value(n) for n in (most - 1, most, most + 1)] == [0.0, 0.0, -1.0]


def test_a_length_in_tokens_must_be_given():
    reward = LengthReward(LengthRewardConfig(max_length=10))
    assert reward.score(Example("x", length=11)).value == -1.0
    part = reward.score(Example("x"))
    assert part.verdict == "error" and "unit: characters" in part.reason


# ---------------------------------------------------------------------------------- without library


def test_without_math_verify_values_are_judged_and_it_is_said(monkeypatch):
    monkeypatch.setattr(math_answer, "is_installed", lambda: False)
    reward = MathAnswer(MathAnswerConfig())
    (note,) = reward.notes
    assert "math-verify is not installed" in note and "equilibrium_mcore[verification]" in note
    verdicts = [
        reward.score(Example(rf"\boxed{{{answer}}}", truth)).verdict
        for answer, truth in ((r"\frac{1}{2}", "0.5"), ("6", "5"), (r"\sqrt{12}", r"2\sqrt{3}"))
    ]
    assert verdicts == ["ok", "wrong", "unparsed"]


def test_a_number_of_json_is_a_truth():
    reward = MathAnswer(MathAnswerConfig(latex="own"))
    assert reward.score(Example(r"\boxed{5.0}", 5)).verdict == "ok"
    assert reward.score(Example(r"\boxed{5.5}", 5.5)).verdict == "ok"
    assert reward.score(Example(r"\boxed{1}", True)).verdict == "error"
    comma = MathAnswer(MathAnswerConfig(latex="own", decimal_comma=True))
    assert comma.score(Example(r"\boxed{5,5}", 5.5)).verdict == "ok"


def test_an_answer_that_was_taken_out_already():
    reward = MathAnswer(MathAnswerConfig(latex="own"))
    assert reward.score(Example("", "5", answer="5")).verdict == "ok"


def test_every_kind_of_reward_has_a_builder():
    assert BUILDERS.keys() == REWARD_CLASSES.keys() - {*ON_RANKS}


def test_no_worker_is_left_when_its_parent_is_killed(tmp_path):
    """A job that is killed runs no clean-up of its own."""
    code = (
        "from equilibrium_mcore.config.rewards import parse_rewards\n"
        "from equilibrium_mcore.verification.scorer import Scorer\n"
        "values = {'rewards': [{'type': 'math_answer', 'latex': 'own'}], 'reward_workers': 1}\n"
        "scorer = Scorer(parse_rewards(values))\n"
        "print(scorer._pool._workers[0].process.pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.02)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # ended, and not yet collected
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
