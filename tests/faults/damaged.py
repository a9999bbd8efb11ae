"""Damaged files of every kind that a command reads, but for a run that resumes (`scenarios.py`).

A copy of something sound has one file damaged. The command that reads it then refuses with an error
that names the file, in words of this project, or it does what it does with the sound copy. Where a
file has no hash (text, tokenizers, what other programs wrote), a flipped bit may be another file
that is as good: then only the form of the answer is checked.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import list_checkpoints
from tests.faults.bench import Bench, Job, expect, no_traceback
from tests.faults.kills import MIXTURE, hashes, tool_inputs

# What libraries call what they cannot read; never a word of this project's.
RAW = re.compile(
    r"SafetensorError|BadZipFile|JSONDecodeError|UnpicklingError|Arrow(?:Invalid|TypeError)|"
    r"zlib\.error|PytorchStreamReader|UnicodeDecodeError|enforce fail|HeaderTooLarge|"
    r"RuntimeError|\[Errno|KeyError|TypeError|AttributeError|INTERNAL"
)


@dataclass(frozen=True)
class Subject:
    """Something that a command reads.

    Attributes:
        make: writes a sound copy into a new folder.
        victims: the files of it that may be damaged, as patterns.
        words: the command for the copy; what it writes goes below `folder / "out"`.
        hashed: every byte of the victims is known, so that what succeeds is right.
    """

    make: Callable[[Bench, Path], None]
    victims: Sequence[str]
    words: Callable[[Bench, Path], Sequence[object]]
    hashed: bool = True


def a_file_damaged(bench: Bench, rng: random.Random, name: str) -> str:
    """One file of a sound copy is damaged, and its command called."""
    subject_name = rng.choice(list(SUBJECTS))
    subject = SUBJECTS[subject_name]
    folder = bench.folder / name
    folder.mkdir()
    subject.make(bench, folder)
    found = {path for pattern in subject.victims for path in folder.glob(pattern)}
    victim = rng.choice(sorted(path for path in found if path.is_file()))
    damage = rng.choice(list(DAMAGES))
    DAMAGES[damage](victim, rng)
    command, *words = subject.words(bench, folder)
    job = bench.command(command, *words)
    status = job.wait()
    what = f"{subject_name}: {damage} of {victim.relative_to(folder)}, status {status}"
    _check_answer(job, status, victim, what)
    if status == 0 and (subject.hashed or damage == "nothing"):
        expected = bench.reference(f"sound {subject_name}", lambda: _sound(bench, subject_name))
        expect(_made(folder) == expected, "what succeeds is right", f"{what}\n{job.text()}")
    shutil.rmtree(folder)
    return what


def _check_answer(job: Job, status: int, victim: Path, what: str) -> None:
    text = job.text()
    expect("Traceback" not in text, f"there is no traceback; {what}", text)
    expect(status in (0, 1, 2), f"the status is of the convention; {what}", (status, text))
    if status == 0:
        return
    # Of a dataset or a checkpoint, its own name is as good as that of one file of it.
    names = {victim.name, victim.stem, victim.parent.name}
    expect(any(name in text for name in names), f"{victim.name} is named; {what}", text)
    raw = RAW.search(text.replace(str(victim.parent), ""))
    expect(raw is None, f"no raw text of a library; {what}", text)


def _sound(bench: Bench, subject_name: str) -> dict[str, str]:
    subject, folder = SUBJECTS[subject_name], bench.folder / f"sound_{subject_name}"
    folder.mkdir()
    subject.make(bench, folder)
    command, *words = subject.words(bench, folder)
    job = bench.command(command, *words)
    expect(job.wait() == 0, f"{subject_name} works when it is sound", job.text())
    no_traceback(job)
    return _made(folder)


def _made(folder: Path) -> dict[str, str]:
    return hashes(folder / "out") if (folder / "out").is_dir() else {}


# -------------------------------------------------------------------------------- the damages


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _flip_early(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(min(len(content), 64))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))] if content else b"")


def _longer(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 5000)))


def _other_kind(path: Path, rng: random.Random) -> None:
    others = (
        rng.randbytes(5000),
        b"a text\n" * 20,
        gzip.compress(b"{}"),
        b"[]",
        b"null",
        b"PK\x03\x04",
    )
    path.write_bytes(rng.choice(others))


def _zeros(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _removed(path: Path, rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing_there"))


def _swapped(path: Path, rng: random.Random) -> None:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if others:
        other = rng.choice(others)
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a flipped bit": _flip,
    "a flipped bit at the beginning": _flip_early,
    "a cut": _cut,
    "bytes after the end": _longer,
    "another kind of file": _other_kind,
    "zeros": _zeros,
    "emptying": _empty,
    "removal": _removed,
    "a folder in place": _folder,
    "a dangling link in place": _dangling,
    "a swap": _swapped,
}


# ------------------------------------------------------------------------------- the subjects


def _copy_checkpoint(bench: Bench, folder: Path) -> None:
    source = list_checkpoints(bench.folder / "reference")[-1]
    shutil.copytree(source, folder / source.name)


def _checkpoint(folder: Path) -> Path:
    return next(folder.glob("step_*"))


def _copy_run(bench: Bench, folder: Path) -> None:
    shutil.copytree(bench.folder / "reference", folder / "run")


def _copy_data(bench: Bench, folder: Path) -> None:
    for path in (bench.folder / "data").glob("first*"):
        shutil.copy(path, folder / path.name)
    shutil.copy(bench.data["tokenizer"]["model"], folder / "tokenizer.model")


def _copy_export(bench: Bench, folder: Path) -> None:
    shutil.copytree(bench.reference("an export", lambda: _exported(bench)), folder / "exported")


def _exported(bench: Bench) -> Path:
    folder = bench.folder / "an_export"
    checkpoint = list_checkpoints(bench.folder / "reference")[-1]
    job = bench.command("convert", "--checkpoint", checkpoint, "--output", folder)
    expect(job.wait() == 0, "an export works", job.text())
    return folder


def _compressed(ending: str) -> Callable[[Bench, Path], None]:
    def make(bench: Bench, folder: Path) -> None:
        content = (bench.folder / "data" / "first.jsonl").read_bytes()
        if ending == "gz":
            content = gzip.compress(content)
        else:
            import zstandard

            content = zstandard.ZstdCompressor(write_checksum=True).compress(content)
        (folder / f"text.jsonl.{ending}").write_bytes(content)
        shutil.copy(bench.data["tokenizer"]["model"], folder / "tokenizer.model")

    return make


def _parquet(bench: Bench, folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    lines = (bench.folder / "data" / "first.jsonl").read_text().splitlines()
    table = pa.table({"text": [json.loads(line)["text"] for line in lines]})
    parquet.write_table(table, folder / "text.parquet")
    _mixture(bench, folder, "text.parquet")


def _mixture(bench: Bench, folder: Path, text: str) -> None:
    model = bench.data["tokenizer"]["model"]
    (folder / "mixture.yaml").write_text(MIXTURE.format(model=model, text=folder / text))


def _jsonl_mixture(bench: Bench, folder: Path) -> None:
    shutil.copy(bench.folder / "data" / "first.jsonl", folder / "text.jsonl")
    _mixture(bench, folder, "text.jsonl")


def _prepared(bench: Bench, folder: Path) -> None:
    shutil.copytree(bench.reference("prepared", lambda: _prepare(bench)), folder / "prepared")


def _prepare(bench: Bench) -> Path:
    folder = bench.folder / "a_prepared_mixture"
    job = bench.command("prepare", tool_inputs(bench) / "mixture.yaml", "--output", folder)
    expect(job.wait() == 0, "a mixture is prepared", job.text())
    return folder


def _preprocess(pattern: str) -> Callable[[Bench, Path], Sequence[object]]:
    def words(bench: Bench, folder: Path) -> Sequence[object]:
        text = sorted(folder.glob(pattern)) or [folder / pattern.replace("*", "gz")]
        return (
            *("preprocess", "--input", text[0], "--output-prefix", folder / "out" / "text"),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", folder / "tokenizer.model", "--workers", 1),
        )

    return words


def _hugging_face_tokenizer(bench: Bench, folder: Path) -> Sequence[object]:
    return (
        *("preprocess", "--input", bench.folder / "data" / "first.jsonl"),
        *("--output-prefix", folder / "out" / "text", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", folder / "exported", "--workers", 1),
    )


def _train(bench: Bench, folder: Path) -> Sequence[object]:
    config = bench.new_run(folder.name).with_suffix(".yaml")
    source = f'[{{"name": "first", "prefix": "{folder}/first_text_document", "weight": 1.0}}]'
    alone = "parallelism={world_size: 1, tensor: 1, expert: 1, sequence: false}"
    return (
        *("train", config, alone, f"data.sources={source}", f"output_directory={folder}/run"),
        *(f"data.tokenizer.model={folder}/tokenizer.model", "training.stop_after_steps=1"),
    )


def _journal(bench: Bench, folder: Path) -> None:
    """What a run of preprocessing that was killed has left."""
    (folder / "out").mkdir()
    text = tool_inputs(bench) / "text.jsonl"
    os.link(text, folder / "text.jsonl")
    shutil.copy(bench.data["tokenizer"]["model"], folder / "tokenizer.model")
    code = STOPPED.format(
        words=[str(word) for word in _preprocess("text.jsonl")(bench, folder)[1:]]
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    left = list((folder / "out").iterdir())
    expect(any("journal" in p.name for p in left), "a killed run has left a journal", left)


# Every range has its line in the journal; at the fourth the process is killed.
STOPPED = """
import os, signal, sys
from equilibrium_mcore.corpus import preprocess, workers
preprocess.preprocess.__kwdefaults__.update(range_bytes=100_000, journal_seconds=0)
encode_range, seen = workers.encode_range, []
def killed(piece, *rest):
    if piece.spans[0].start > 400_000:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_range(piece, *rest)
workers.encode_range = killed
from equilibrium_mcore.cli.command import run_subcommand
run_subcommand("preprocess", {words!r}, program="preprocess")
"""

SUBJECTS: dict[str, Subject] = {
    "a checkpoint to convert": Subject(
        _copy_checkpoint,
        ("step_*/*", "step_*/.metadata"),
        lambda bench, folder: (
            *("convert", "--checkpoint", _checkpoint(folder), "--output", folder / "out"),
        ),
    ),
    "a checkpoint to generate from": Subject(
        _copy_checkpoint,
        ("step_*/*", "step_*/.metadata"),
        lambda bench, folder: (
            *("generate", _checkpoint(folder), "--prompt", "a", "--max-new-tokens", 2),
        ),
    ),
    "a run's ledger": Subject(
        _copy_run, ("run/ledger.jsonl",), lambda bench, folder: ("ledger", folder / "run"), False
    ),
    "a run's documents": Subject(
        _copy_run,
        ("run/ledger.jsonl", "run/config.yaml"),
        lambda bench, folder: ("ledger", folder / "run", "--step", 3),
        False,
    ),
    "a run's metrics": Subject(
        _copy_run,
        ("run/metrics.jsonl",),
        lambda bench, folder: ("plot", folder / "run", "--output", folder / "curves.png"),
        False,
    ),
    "a run to resume": Subject(
        _copy_run,
        ("run/config.yaml", "run/checkpoints/latest"),
        lambda bench, folder: ("resume", folder / "run", "--check"),
        False,
    ),
    "a dataset to train on": Subject(
        _copy_data, ("first_text_document.*", "tokenizer.model"), _train, False
    ),
    "a dataset to verify": Subject(
        _copy_data,
        ("first_text_document.*",),
        lambda bench, folder: ("preprocess", "--verify", folder / "first_text_document"),
    ),
    "a dataset to merge": Subject(
        _copy_data,
        ("first_text_document.*",),
        lambda bench, folder: (
            *("merge", "--input", folder / "first_text_document"),
            *(bench.folder / "data" / "second_text_document", "--output-prefix"),
            folder / "out" / "both_text_document",
        ),
        False,
    ),
    "a text to preprocess": Subject(
        _copy_data, ("first.jsonl", "tokenizer.model"), _preprocess("first.jsonl"), False
    ),
    "a gzip text": Subject(_compressed("gz"), ("text.jsonl.gz",), _preprocess("text.jsonl.*")),
    "a Zstandard text": Subject(
        _compressed("zst"), ("text.jsonl.zst",), _preprocess("text.jsonl.*"), False
    ),
    "a journal of preprocessing": Subject(
        _journal, ("out/*", "out/.*"), _preprocess("text.jsonl"), False
    ),
    "a Parquet file of a mixture": Subject(
        _parquet,
        ("text.parquet",),
        lambda bench, folder: ("prepare", folder / "mixture.yaml", "--output", folder / "out"),
        False,
    ),
    "a text of a mixture": Subject(
        _jsonl_mixture,
        ("text.jsonl", "mixture.yaml"),
        lambda bench, folder: ("prepare", folder / "mixture.yaml", "--output", folder / "out"),
        False,
    ),
    "a prepared mixture": Subject(
        _prepared,
        ("prepared/*", "prepared/*/*"),
        lambda bench, folder: ("analyze", folder / "prepared"),
        False,
    ),
    "an export to generate from": Subject(
        _copy_export,
        ("exported/*",),
        lambda bench, folder: (
            *("generate", folder / "exported", "--prompt", "a", "--max-new-tokens", 2),
        ),
        False,
    ),
    "an export's tokenizer": Subject(
        _copy_export, ("exported/tokenizer*",), _hugging_face_tokenizer, False
    ),
}
