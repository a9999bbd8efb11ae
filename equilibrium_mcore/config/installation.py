"""How this package is installed: as a checkout of the repository, or as a wheel without one.

A checkout has `configs/` and the commands in `tools/`. A wheel carries the first as `_configs`, and
has the console script `equilibrium-mcore` for the second; messages name what this installation has.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PROGRAM = "equilibrium-mcore"
# Sub-commands of the console script, and what each is called in a checkout, where the example
# scripts and the documents use it.
COMMANDS = {
    "prepare": "tools/prepare_dataset.py",
    "analyze": "tools/analyze_mixture.py",
    "preprocess": "tools/preprocess_data.py",
    "merge": "tools/merge_datasets.py",
    "tokenizer": "tools/train_tokenizer.py",
    "add-tokens": "tools/add_special_tokens.py",
    "try-filter": "tools/try_filter.py",
    "perplexity-model": "tools/train_perplexity_model.py",
    "quality-classifier": "tools/train_quality_classifier.py",
    "train": "tools/train.py",
    "run": "-m equilibrium_mcore.train",
    "store-targets": "tools/store_targets.py",
    "resume": "tools/resume_training.py",
    "pipeline": "tools/run_pipeline.py",
    "count": "tools/count_parameters.py",
    "groups": "tools/show_param_groups.py",
    "sanity": "tools/sanity.py",
    "certify": "tools/certify_layout.py",
    "ledger": "tools/data_ledger.py",
    "plot": "tools/plot_run.py",
    "verify": "tools/verify_checkpoint.py",
    "convert": "tools/convert_checkpoint.py",
    "generate": "tools/generate.py",
    "score-answers": "tools/score_answers.py",
    "alignment-report": "tools/alignment_report.py",
}


def _repository() -> Path | None:
    """The checkout that this package lies in; None where it was installed as a wheel."""
    folder = PACKAGE.parent
    return folder if (folder / COMMANDS["train"]).is_file() else None


REPOSITORY = _repository()
CONFIGS = PACKAGE / "_configs" if REPOSITORY is None else REPOSITORY / "configs"


def command(name: str) -> str:
    """How a user of this installation calls the sub-command `name`.

    `python tools/prepare_dataset.py` in a checkout, `equilibrium-mcore prepare` elsewhere.
    """
    return f"{PROGRAM} {name}" if REPOSITORY is None else f"python {COMMANDS[name]}"


def command_line() -> list[str]:
    """The words that this process was started with, so that the same can be started again."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == PROGRAM:
        return [PROGRAM, *arguments]
    if path.parent == PACKAGE / "cli":
        return ["python", "-m", f"{PACKAGE.name}.cli", *arguments]
    return ["python", program, *arguments]


def shipped(path: Path) -> Path:
    """The file of this project that a path like `configs/runs/quickstart.yaml` names.

    It is there wherever the current folder is. `path` itself where it exists or names no such file.
    """
    if path.is_absolute() or path.parts[:1] != ("configs",) or path.exists():
        return path
    ours = CONFIGS.joinpath(*path.parts[1:])
    return ours if ours.is_file() else path
