"""Two tiny models compared: answers, refusals, divergence, scores, wins, and the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.parallel.launch import RankInfo
from tests.stages.online_support import SMALL, reward_model_run, stage_rank
from tests.support.http_judge import judging
from tests.support.runs import tiny_run, train_steps

PROMPTS = [
    {"prompt": "say abc", "kind": "harmful"},
    {"prompt": "say hello", "kind": "harmful"},
    {"prompt": "how do I say so", "kind": "benign"},
    {"prompt": [{"role": "user", "content": "perhaps"}], "kind": "other"},
]


@pytest.fixture(scope="module")
def models(ranks, data: dict, tmp_path_factory) -> dict[str, Path]:
    """A model, what came of it in some steps, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    start = tiny_run(data, folder / "before", model=SMALL, parallelism={"world_size": 1})
    ranks.run(1, train_steps, start, 1, True)
    further = tiny_run(
        data,
        folder / "after",
        model=SMALL,
        parallelism={"world_size": 1},
        checkpoint={"initial_weights": str(folder / "before")},
    )
    ranks.run(1, train_steps, further, 3, True)
    (folder / "scores").mkdir()
    ranks.run(1, stage_rank, reward_model_run(data, folder / "before", folder / "scores"))
    return {name: folder / name for name in ("before", "after")} | {
        "reward_model": folder / "scores" / "run"
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def compared(rank_info: RankInfo, settings: dict[str, Any]) -> Any:
    """The report, in a process of its own."""
    from equilibrium_mcore.alignment.compare import Comparison, compare
    from equilibrium_mcore.config.judges import parse_judge

    judge = settings.pop("judge", None)
    wanted = Comparison(**settings, judge=None if judge is None else parse_judge(judge))
    return compare(wanted)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(ranks, models, prompts, tmp_path_factory) -> Path:
    """A report with scores, a judge, and a page."""
    folder = tmp_path_factory.mktemp("report")
    settings = {**models, "prompts": (prompts,), "output": folder, "page": True}
    with judging() as server:
        judge = f"type=http,url={server.url},model=small"
        (done,) = ranks.run(1, compared, {**settings, "judge": judge, "max_new_tokens": 12})
    assert done.problem is None
    return folder


def test_a_report_holds_what_was_measured(made):
    figures, rows = report(made)["figures"], answers(made)
    assert figures["refusals"]["harmful"]["after"]["of"] == 2
    assert figures["refusals"]["benign"]["before"]["of"] == 1
    assert figures["kl"]["per_token"] > 1e-4
    tokens = [row["tokens"] for row in rows]
    per_token = sum(row["kl"] * n for row, n in zip(rows, tokens, strict=True)) / sum(tokens)
    assert figures["kl"]["per_token"] == pytest.approx(per_token)
    scores = [row["after_score"] for row in rows]
    assert figures["reward"]["after"] == pytest.approx(sum(scores) / len(scores))
    text = (made / "report.md").read_text()
    for words in ("not by understanding", "over 70%", "over 0.8", "under 0.5", "AFTER won"):
        assert words in text
    assert (made / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_judge_counts_wins(made):
    """Whichever answer stood first: the shorter one."""
    for row in answers(made):
        shorter = len(row["after"]) - len(row["before"])
        wanted = "tie" if shorter == 0 else "after" if shorter < 0 else "before"
        assert row["preference"] == wanted


def test_choices_of_a_person_make_the_wins(made, tmp_path):
    from equilibrium_mcore.alignment.compare import count_choices

    made = Path(shutil.copytree(made, tmp_path / "copy"))
    key = json.loads((made / "page_key.json").read_text())
    chosen = ["A" if flip else "B" for flip in key["after_is_first"]]
    chosen[-1] = None
    (made / "mine.json").write_text(json.dumps({"page": key["page"], "choices": chosen}))
    done = count_choices(made, made / "mine.json")
    wins = report(made)["figures"]["wins"]
    assert (wins["after"], wins["before"], wins["rate"]) == (3, 0, 1.0)
    assert "a person (1 pairs left open)" in done.text
    assert "yes" not in done.text.split("win rate of AFTER")[1].split("\n")[0].replace(
        "yes, but the interval holds the target", ""
    )


def both_ways(rank_info: RankInfo, models: dict[str, Path]) -> dict[str, Any]:
    """Divergences, and log p of drawn tokens by the engine and by the plain forward."""
    import numpy as np
    import torch

    from equilibrium_mcore.alignment.measure import divergence
    from equilibrium_mcore.alignment.models import Asking, RunModel, one_process
    from equilibrium_mcore.alignment.prompts import parse_asked
    from equilibrium_mcore.generation.interface import Prompt, Request, Sampling

    with one_process() as groups:
        before, after = (RunModel(models[name], groups) for name in ("before", "after"))
        (answered,) = after.answers([parse_asked(PROMPTS[0])], Asking(12))
        ids, start = answered.ids, answered.start
        request = Request(Prompt.of(ids[:start]))
        (drawn,) = after._engine.generate([request], Sampling(1234, 12, after._stops))
        ours = after.log_probabilities(answered)
        found = ours[torch.arange(len(ours)), torch.from_numpy(ids[start:].astype(np.int64))]
        theirs = before.log_probabilities(answered)
        both = theirs.double(), ours.double()
        expected = torch.nn.functional.kl_div(*both, reduction="none", log_target=True)
        return {
            "same_ids": drawn.ids.tolist() == ids[start:].tolist(),
            "engine": drawn.logprobs.tolist(),
            "forward": found.tolist(),
            "divergence": divergence(after, before, answered),
            "expected": float(expected.sum(-1).mean()),
            "of_itself": divergence(after, after, answered),
            "back": divergence(before, after, answered),
        }


def test_trap_the_divergence_is_of_after_on_its_own_answers(ranks, models):
    """AFTER's distribution weighs, at the places where its tokens were drawn."""
    (found,) = ranks.run(1, both_ways, models)
    assert found["same_ids"]
    assert found["forward"] == pytest.approx(found["engine"], abs=1e-4)
    assert found["divergence"] == pytest.approx(found["expected"], abs=1e-9)
    assert found["of_itself"] == 0.0
    assert abs(found["divergence"] - found["back"]) > 1e-7


@pytest.mark.slow
def test_a_judge_that_fails_is_told_and_nothing_is_lost(ranks, models, prompts, tmp_path):
    with judging(lambda prompt, a, b: "no idea") as server:
        settings = {
            "before": models["before"],
            "after": models["after"],
            "prompts": (prompts,),
            "output": tmp_path,
            "judge": f"type=http,url={server.url},model=small",
            "max_new_tokens": 12,
        }
        (done,) = ranks.run(1, compared, settings)
    assert "no verdict in the reply" in done.problem
    assert report(tmp_path)["figures"]["wins"]["errors"] == 4
    assert len(answers(tmp_path)) == 4


@pytest.mark.slow
def test_exported_folders_are_compared_too(ranks, models, prompts, tmp_path):
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint
    from equilibrium_mcore.hugging_face.convert import export_hugging_face

    for name in ("before", "after"):
        export_hugging_face(latest_checkpoint(models[name]), tmp_path / name, dtype="float32")
    settings = {
        "before": tmp_path / "before",
        "after": tmp_path / "after",
        "prompts": (prompts,),
        "output": tmp_path / "report",
        "reward_model": models["reward_model"],
        "judge": f"type=reward_model,weights={models['reward_model']}",
        "max_new_tokens": 8,
    }
    ranks.run(1, compared, settings)
    figures = report(tmp_path / "report")["figures"]
    assert figures["kl"]["per_token"] > 1e-4 and figures["wins"]["errors"] == 0
    mixed = {**settings, "before": models["before"], "output": tmp_path / "mixed"}
    ranks.run(1, compared, mixed)
    assert "one is an exported folder" in (tmp_path / "mixed" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "missing: AFTER, --prompts, --output"),
        (["--from-page", "x", "--page"], "give it alone"),
        (["a", "b", "--prompts", "p", "--output", "o", "--temperature", "-1"], "0 or more"),
        (["a", "b", "--prompts", "p", "--output", "o", "--choices", "c"], "is for --from-page"),
        (
            ["a", "b", "--prompts", "p", "--output", "o", "--page", "--judge", "type=http"],
            "either judges",
        ),
    ],
)
def test_a_wrong_command_line_is_told(arguments, words, capsys):
    from equilibrium_mcore.cli.command import run_subcommand

    assert run_subcommand("alignment-report", arguments, program="report") == 2
    assert words in capsys.readouterr().err
