"""Blind comparison of both models' answers: by a judge over HTTP, or by a reward model's scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from equilibrium_mcore.alignment.rows import Row
from equilibrium_mcore.config.judges import HttpJudgeConfig
from equilibrium_mcore.verification.error_share import TooManyErrorsError
from equilibrium_mcore.verification.http_judge import HttpJudge
from equilibrium_mcore.verification.pairwise import Compared, Question

NAMES = ("before", "after")


def after_is_first(row: Row, seed: int) -> bool:
    """Whether AFTER's answer is shown first: by a hash, so that the place tells nothing."""
    digest = hashlib.blake2b(f"{seed}/{row.prompt}".encode(), digest_size=1).digest()
    return bool(digest[0] & 1)


def judge_texts(rows: Sequence[Row], config: HttpJudgeConfig, *, seed: int) -> str | None:
    """Ask the judge of every pair, in both orders, and note its preferences in the rows.

    Returns what went wrong where too many could not be judged; what could be is noted all the same.
    """
    flipped = [after_is_first(row, seed) for row in rows]
    questions = [
        Question(row.prompt, *((row.after, row.before) if flip else (row.before, row.after)))
        for row, flip in zip(rows, flipped, strict=True)
    ]
    problem: str | None = None
    compared: Sequence[Compared]
    try:
        compared = HttpJudge(config)(questions)
    except TooManyErrorsError as error:
        compared, problem = error.scored, str(error)
    for row, one, flip in zip(rows, compared, flipped, strict=True):
        row.preference = preferred(one.preference, after_first=flip)
        row.swayed = one.swayed
    return problem


def preferred(preference: str, *, after_first: bool) -> str:
    """Of first and second, which model's answer it is."""
    if preference not in ("first", "second"):
        return preference
    return NAMES[(preference == "first") == after_first]


def judge_scores(rows: Sequence[Row], *, tie_margin: float) -> None:
    """Note in the rows whose score is larger; they have scores."""
    for row in rows:
        assert row.before_score is not None and row.after_score is not None
        gain = row.after_score - row.before_score
        if row.before == row.after or abs(gain) <= tie_margin:
            row.preference = "tie"
        else:
            row.preference = NAMES[gain > 0]
