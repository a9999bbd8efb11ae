"""Every command called in a wrong way: told in words, with a status that means something.

`misuse_case` draws a command, options from its own parser, and values that do not fit.
"""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from equilibrium_mcore.config.installation import COMMANDS
from tests.faults.bench import expect
from tests.support.attempts import TRACEBACK, attempt
from tests.support.materials import Materials, materials, menagerie, state_of

SECONDS = 240  # for a hang alone
CONVENTION = {0, 1, 2}
NO_VERDICT = 3  # of certify alone
# What a command must not begin here, since it would train for minutes.
BOUNDED = {
    "train": ["--check"],
    "resume": ["--check"],
    "run": ["--check"],
    "pipeline": ["--dry-run"],
    "certify": ["--time-limit", "0.5"],
}
WRITTEN = (
    "output",
    "output_prefix",
    "json",
    "plot",
    "output_dir",
)  # options that name what is made
INTEGERS = ("0", "-1", "1", "3", "999999999999", "99999999999999999999")
NUMBERS = (*INTEGERS, "1.5", "-0.5", "0.3", "nan", "inf", "-inf", "1e400", "1e-320")
NO_NUMBERS = ("x", "", " ", "1e3", "２", "0x10", "1_0", "1,5")
# A command line that works, by the names of its files; one thing of it is spoilt.
GOOD = {
    "count": ["@good_config"],
    "groups": ["@good_config"],
    "tokenizer": ["--input", "@good_lines", "--output", "@new_model", "--vocab-size=300"],
    "preprocess": [
        "--input", "@good_lines", "--output-prefix", "@new", "--tokenizer-model", "@good_tokenizer",
        "--tokenizer-type=SentencePieceTokenizer", "--workers=1",
    ],
    "merge": ["--input", "@good_prefix", "@other_prefix", "--output-prefix", "@new"],
    "add-tokens": ["@good_tokenizer", "--output", "@new_model", "--tokens", "<|x|>"],
    "try-filter": ["@good_lines", "--filter=type=length,min_length=10", "--sample=20"],
    "perplexity-model": [
        "--input", "@good_lines", "--output", "@new_tensors", "--max-characters=20000",
    ],
    "quality-classifier": [
        "--positive", "@good_lines", "--negative", "@other_lines", "--output", "@new_tensors",
        "--bits=10",
    ],
    "prepare": ["@good_mixture", "--output", "@new_folder", "--workers=1"],
    "analyze": ["@good_mixture", "--model", "llama_1b"],
    "train": [
        "--stage=pretrain", "--data_mixture", "@good_mixture", "--model_config=llama_1b",
        "--output_dir", "@new_folder", "--run_name=x", "--check",
    ],
    "run": ["@good_config", "--check"],
    "resume": ["@good_run", "--check"],
    "pipeline": ["@good_pipeline", "--dry-run"],
    "ledger": ["@good_run", "--step=1"],
    "plot": ["@good_run", "--output", "@new_png"],
    "verify": ["@good_run"],
    "convert": ["--checkpoint", "@good_run", "--output", "@new_folder"],
    "generate": ["@good_run", "--prompt=a", "--max-new-tokens=2"],
}  # fmt: skip
PIPELINE = """\
name: two
folder: out
variables: {text: hello}
steps:
  - name: first
    command: [tools/count_parameters.py, "${text}"]
    outputs: {file: "${folder}/a"}
"""
TEXTS = ("", " ", "no such", "é世界", "a=b", "*-|*-", "=", "=1", "a.b.c=1", "-", "x" * 400, "a\nb",
         "name=", "training.steps=0", "{", "--", "..", "/")  # fmt: skip


def misuse_case(rng: random.Random, folder: Path) -> str:
    """Draw a command line, call it; what was tried and what came of it.

    Raises BrokenPromiseError for a traceback, a hang, an exit status beyond the convention, and
    where a file that was there before is another one after a command that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    m = materials()
    paths = {**menagerie(folder / "odd"), **_good(m, folder / "good")}
    name = rng.choice(list(COMMANDS))
    drawn = name not in GOOD or rng.random() < 0.3
    words = _words(rng, name, paths) if drawn else _spoilt(rng, name, paths)
    told = f"{name} {' '.join(_short(word) for word in words)}"
    before = state_of(folder)
    found = attempt(call, [name, *words], folder=folder, seconds=SECONDS)
    after = state_of(folder)
    evidence = found.text[-3000:]
    expect(found.status is not None, f"a misused command ends: {told}", evidence)
    expect(TRACEBACK not in found.text, f"a misuse is told without a traceback: {told}", evidence)
    allowed = CONVENTION | ({NO_VERDICT} if name == "certify" else set())
    expect(found.status in allowed, f"{told}: ends with {found.status}", evidence)
    if found.status:
        expect(found.text.strip() != "", f"a failure is told: {told}")
        changed = [path for path, content in before.items() if after.get(path) != content]
        expect(not changed, f"a failed command changes nothing that was there: {told}", changed)
    return f"{told}: {found.status}, {found.last_line[:120]}"


def call(arguments: list[str]) -> int:
    """`equilibrium-mcore ARGUMENTS`."""
    from equilibrium_mcore.cli.__main__ import main

    return main(arguments)


def _good(m: Materials, folder: Path) -> dict[str, Path]:
    """Copies of what commands like, which they may be given in the wrong place."""
    folder.mkdir()
    shutil.copytree(m.folder / "data", folder / "data")
    shutil.copytree(m.run, folder / "run")
    shutil.copy(m.config, folder / "run.yaml")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    source = {"name": "a", "source": str(folder / "data" / "first.jsonl"), "mix_ratio": 1.0}
    mixture = {
        "metadata": {"phase": "pretrain", "total_tokens": 2000},
        "tokenizer": {**m.data["tokenizer"], "model": str(folder / "data" / "tokenizer.model")},
        "datasets": [source],
        "validation": {"ratio": 0.1, "seed": 7},
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    return {
        "good_mixture": folder / "mixture.yaml",
        "good_pipeline": folder / "pipeline.yaml",
        "other_lines": folder / "data" / "second.jsonl",
        "other_prefix": folder / "data" / "second_text_document",
        "new_tensors": folder / "new.safetensors",
        "new_folder": folder / "new_folder",
        "good_lines": folder / "data" / "first.jsonl",
        "good_tokenizer": folder / "data" / "tokenizer.model",
        "good_prefix": folder / "data" / "first_text_document",
        "good_run": folder / "run",
        "good_config": folder / "run.yaml",
        "good_checkpoint": next((folder / "run" / "checkpoints").glob("step_*")),
        "new": folder / "new" / "result",
        "new_png": folder / "new.png",
        "new_json": folder / "new.json",
        "new_model": folder / "new.model",
    }


def _spoilt(rng: random.Random, name: str, paths: dict[str, Path]) -> list[str]:
    """A command line that works, with one or two words changed, taken out or added."""
    words = [str(paths[w[1:]]) if w.startswith("@") else w for w in GOOD[name]]
    for _ in range(rng.choice((1, 1, 1, 2))):
        place = rng.randrange(len(words))
        word = words[place]
        how = rng.random()
        if how < 0.1:
            del words[place]
        elif how < 0.3:
            words[place:place] = _words(rng, name, paths)[:2]
        elif word.startswith("--") and "=" in word:
            number = word.rpartition("=")[2].isdigit()
            odd = rng.choice((*INTEGERS, *NO_NUMBERS) if number else TEXTS)
            words[place] = f"{word.partition('=')[0]}={odd}"
        elif not word.startswith("--"):
            words[place] = str(paths[rng.choice(list(paths))])
        words = words or ["--"]
    return [*words, *(word for word in BOUNDED.get(name, []) if word not in words)]


def _words(rng: random.Random, name: str, paths: dict[str, Path]) -> list[str]:
    if name == "run":  # it has a command line of its own kind
        words = [_value(rng, "config", None, paths) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        words += rng.choices(
            (*TEXTS, "--what", "--check", "-x", "--host", "--host=gpu"), k=rng.randrange(3)
        )
        return [*words, *BOUNDED["run"]]
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"equilibrium_mcore.cli.{name.replace('-', '_')}")
    module.add_arguments(parser)
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if rng.random() < (0.08 if action.required else 0.7):
            continue
        words += _option(rng, action, paths)
    if rng.random() < 0.1:
        words.append(rng.choice(("--what", "-z", "--", "extra", "=")))
    words += BOUNDED.get(name, [])
    return words


def _option(rng: random.Random, action: argparse.Action, paths: dict[str, Path]) -> list[str]:
    name = rng.choice(action.option_strings) if action.option_strings else None
    if action.nargs == 0:
        return [name]
    count = 1 if action.nargs in (None, "?") else rng.choice((1, 1, 2, 3))
    if action.nargs == "*" and rng.random() < 0.6:
        count = 0
    values = [_value(rng, action.dest, action, paths) for _ in range(count)]
    if name is None:
        return values
    # A value that begins with - is one only after a =.
    glued = name.startswith("--") and count == 1
    return [f"{name}={values[0]}"] if glued else [name, *values]


def _value(rng: random.Random, dest: str, action: Any, paths: dict[str, Path]) -> str:
    if action is not None and action.choices and rng.random() < 0.85:
        return str(rng.choice(list(action.choices)))
    kind = getattr(action, "type", None)
    if kind in (int, float):
        numbers = INTEGERS if kind is int else NUMBERS
        return rng.choice(numbers if rng.random() < 0.9 else NO_NUMBERS)
    if dest in WRITTEN and rng.random() < 0.5:
        return str(paths[rng.choice(("new", "new_png", "new_json", "new_model"))])
    is_path = kind is not None or dest in ("config", "mixture", "subject", "model", "pipeline")
    if is_path and rng.random() < 0.9:
        good = [name for name in paths if name.startswith("good")]
        names = good if rng.random() < 0.5 else list(paths)
        return str(paths[rng.choice(names)])
    return rng.choice(TEXTS)


def _short(word: str) -> str:
    word = word if len(word) < 60 else f"...{word[-50:]}"
    return repr(word) if not word or any(c.isspace() for c in word) else word
