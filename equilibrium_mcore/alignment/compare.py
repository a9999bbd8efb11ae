"""The whole of an alignment report: ask, judge, write; and later, count what a person chose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from equilibrium_mcore.alignment.judged import judge_scores, judge_texts
from equilibrium_mcore.alignment.measure import measure
from equilibrium_mcore.alignment.models import Asking
from equilibrium_mcore.alignment.page import CHOICES, PAGE, read_choices, write_page
from equilibrium_mcore.alignment.picture import write_picture
from equilibrium_mcore.alignment.prompts import read_asked
from equilibrium_mcore.alignment.report import Asked, figures_of, markdown
from equilibrium_mcore.alignment.rows import Row
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.judges import HttpJudgeConfig, ModelJudgeConfig
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.whole import write_whole

ANSWERS, REPORT, DATA, PICTURE = "answers.jsonl", "report.md", "report.json", "report.png"
PERSON = "a person"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Comparison:
    """What is compared, how, and where it goes."""

    before: Path
    after: Path
    prompts: tuple[Path, ...]
    output: Path
    judge: HttpJudgeConfig | ModelJudgeConfig | None = None
    reward_model: Path | None = None
    page: bool = False
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 1234


@dataclass(frozen=True)
class Done:
    """The report as text; and why pairs were not judged, if a judge failed."""

    text: str
    problem: str | None = None


def compare(wanted: Comparison, *, say: Say = lambda text: None) -> Done:
    """Make the report of two models.

    Raises ConfigError, FileNotFoundError, ValueError and DamagedCheckpointError for prompts and
    models that cannot be read; nothing is written then.
    """
    prompts, judge = read_asked(wanted.prompts), wanted.judge
    reward_model = wanted.reward_model
    if isinstance(judge, ModelJudgeConfig):
        if reward_model not in (None, judge.weights):
            raise ConfigError(
                f"--judge by the reward model {judge.weights}, and --reward-model {reward_model}: "
                "leave --reward-model out, or name the same"
            )
        reward_model = judge.weights
    asking = Asking(wanted.max_new_tokens, wanted.temperature, wanted.seed)
    measured = measure(
        wanted.before, wanted.after, prompts, asking, reward_model=reward_model, say=say
    )
    asked = Asked(
        before=str(wanted.before),
        after=str(wanted.after),
        temperature=wanted.temperature,
        max_new_tokens=wanted.max_new_tokens,
        seed=wanted.seed,
        reward_model=None if reward_model is None else str(reward_model),
        judge=_name(judge),
        no_kl=measured.no_kl,
    )
    wanted.output.mkdir(parents=True, exist_ok=True)
    if isinstance(judge, HttpJudgeConfig):
        _write_answers(wanted.output, measured.rows)  # so that a judge that fails loses nothing
        say(f"{asked.judge}: judging {len(prompts)} pairs in both orders")
        asked = replace(asked, problem=judge_texts(measured.rows, judge, seed=wanted.seed))
    elif judge is not None:
        judge_scores(measured.rows, tie_margin=judge.tie_margin)
    if wanted.page:
        write_page(measured.rows, wanted.output, seed=wanted.seed)
        say(f"open {wanted.output / PAGE}, choose, and give its choices to --from-page")
    return _written(wanted.output, asked, measured.rows)


def count_choices(folder: Path, choices: Path | None) -> Done:
    """The report in `folder` again, with what a person chose on its page.

    Raises ConfigError for a folder without a page, and for choices of another one.
    """
    if not (folder / DATA).is_file():
        raise ConfigError(f"{folder} has no {DATA}: name the folder of a report made with --page")
    values = json.loads((folder / DATA).read_text(encoding="utf-8"))
    asked = Asked(**values["asked"])
    lines = (folder / ANSWERS).read_text(encoding="utf-8").splitlines()
    rows = [Row(**json.loads(line)) for line in lines]
    still = read_choices(rows, folder, choices or folder / CHOICES)
    judge = PERSON + (f" ({still} pairs left open)" if still else "")
    return _written(folder, replace(asked, judge=judge, problem=None), rows)


def _name(judge: HttpJudgeConfig | ModelJudgeConfig | None) -> str | None:
    if isinstance(judge, HttpJudgeConfig):
        return f"{judge.model} at {judge.url}"
    return None if judge is None else f"the scores of {judge.weights}"


def _write_answers(folder: Path, rows: Sequence[Row]) -> None:
    write_whole(folder / ANSWERS, b"".join(json_line(row.as_dict()) for row in rows))


def _written(folder: Path, asked: Asked, rows: Sequence[Row]) -> Done:
    figures = figures_of(rows)
    _write_answers(folder, rows)
    has_picture = write_picture(folder / PICTURE, figures, rows)
    values: dict[str, Any] = {"asked": asdict(asked), "figures": figures}
    write_whole(folder / DATA, (json.dumps(values, indent=1) + "\n").encode())
    text = markdown(asked, figures, rows, picture=has_picture)
    write_whole(folder / REPORT, text.encode())
    head, _, _ = text.partition("\n## Answers")
    return Done(f"{head}\n{folder / REPORT}, {DATA}, {ANSWERS}", asked.problem)
