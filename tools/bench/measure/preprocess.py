"""The preprocessing beside Megatron-LM's two tools: whole processes, the same text, equal bytes.

Megatron-LM's tools come from a checkout that the user names; nothing of it is here. Every run is a
new process with nothing loaded, from its start to its end; the tools take turns, so that a machine
whose speed drifts treats them alike; and the bytes that they write are compared.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from equilibrium_mcore.data.jsonl import parse_object
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.whole import whole_file, write_whole

TEXT_ENDINGS = (
    ".py .pyi .txt .md .rst .h .hpp .c .js .html .po .json .xml .pl .pm .sh .css .yaml .toml .tex"
).split()
TEXT_ROOTS = ("/usr/share", "/usr/lib", "/usr/include")
LARGEST_FILE_BYTES = 2_000_000
TOKENIZER_TEXT_BYTES = 20_000_000
VOCABULARY = 32_000
COLUMNS = (
    "tool",
    "runs",
    "wall s: min, median, max",
    "MB/s",
    "CPU s",
    "peak GiB",
    "wall, CPU: ratio",
)
CLONE = "git clone --depth 1 https://github.com/NVIDIA/Megatron-LM"


@dataclass
class Runs:
    """What was measured of one tool: seconds, CPU seconds, peak GiB of one of its processes."""

    name: str
    command: list[str]
    prefix: Path
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)


def run_benchmark(
    *,
    tool: Path,
    folder: Path,
    megatron: Path | None,
    input_path: Path | None = None,
    megabytes: float = 200.0,
    workers: int = 2,
    repetitions: int = 3,
    slow_repetitions: int = 1,
) -> str:
    """Measure, compare the bytes, and return a Markdown table.

    Args:
        tool: this project's tools/preprocess_data.py.
        folder: for text, tokenizer and outputs; text and tokenizer are used again.
        megatron: a checkout of Megatron-LM; None measures this project's tool alone.
        input_path: JSONL with `text`; None collects text of this machine.

    Raises FileNotFoundError, and RuntimeError for a tool that fails or whose bytes differ.
    """
    if megatron is not None and not (megatron / "tools" / "preprocess_data_fast.py").is_file():
        raise FileNotFoundError(
            f"{megatron} is no checkout of Megatron-LM with tools/preprocess_data_fast.py: {CLONE}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: the memory of this one would count as its children's peak.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        made = apart.submit(prepare, folder, input_path, megabytes)
        source, tokenizer = made.result()
    tools = [*_tools(tool, folder, source, tokenizer, megatron, workers)]
    for number in range(max(repetitions, slow_repetitions)):
        for runs in tools:
            if number < (slow_repetitions if runs.name == "preprocess_data.py" else repetitions):
                _run(runs)
    equal = _compare(tools)
    return _table(tools, source.stat().st_size / 1e6, equal)


def _tools(
    tool: Path, folder: Path, source: Path, tokenizer: Path, megatron: Path | None, workers: int
) -> Iterator[Runs]:
    shared = ["--input", source, "--tokenizer-type", "HuggingFaceTokenizer"]
    shared += ["--tokenizer-model", tokenizer, "--append-eod"]
    scripts = {"this project": (tool, ["--workers", workers, "--overwrite"])}
    if megatron is not None:
        theirs = megatron.resolve() / "tools"
        fast, plain = "preprocess_data_fast.py", "preprocess_data.py"
        scripts[fast] = (theirs / fast, ["--use-gigatoken"])
        scripts[plain] = (theirs / plain, ["--workers", workers])
    for name, (script, options) in scripts.items():
        prefix = folder / "out" / name.replace(" ", "_").removesuffix(".py")
        command = [sys.executable, script, *shared, *options, "--output-prefix", prefix]
        yield Runs(name, [str(word) for word in command], Path(f"{prefix}_text_document"))


def _run(tool: Runs) -> None:
    tool.prefix.parent.mkdir(exist_ok=True)
    script = Path(tool.command[1])
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    path = tool.prefix.with_name(f"{tool.prefix.name}.log")
    with path.open("wb") as log:  # not whole: a process writes to it
        started = time.perf_counter()
        process = subprocess.Popen(tool.command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{tool.name} failed with {process.returncode}: see {log.name}")
    tool.seconds.append(seconds)
    tool.cpu_seconds.append(usage.ru_utime + usage.ru_stime)
    tool.peak_gib.append(usage.ru_maxrss / 2**20)
    print(f"{tool.name}: {seconds:.2f} s, {tool.cpu_seconds[-1]:.2f} s of CPU", file=sys.stderr)


def _compare(tools: Sequence[Runs]) -> str:
    """SHA-256 of .bin and .idx, equal for all tools; raises RuntimeError if they are not."""
    sums = {}
    for tool in tools:
        if tool.seconds:
            digests = [_sha256(Path(f"{tool.prefix}.{ending}")) for ending in ("bin", "idx")]
            sums[tool.name] = tuple(digests)
    if len(set(sums.values())) > 1:
        raise RuntimeError(f"the tools wrote different bytes: {sums}")
    return next(iter(sums.values()))[0][:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _table(tools: Sequence[Runs], megabytes: float, digest: str) -> str:
    measured = [tool for tool in tools if tool.seconds]
    ours, our_cpu = map(statistics.median, (measured[0].seconds, measured[0].cpu_seconds))
    rows = []
    for tool in measured:
        middle, cpu = statistics.median(tool.seconds), statistics.median(tool.cpu_seconds)
        rows.append(
            (
                tool.name,
                len(tool.seconds),
                f"{min(tool.seconds):.2f}, {middle:.2f}, {max(tool.seconds):.2f}",
                f"{megabytes / middle:.1f}",
                f"{cpu:.2f}",
                f"{max(tool.peak_gib):.2f}",
                f"{middle / ours:.1f}, {cpu / our_cpu:.1f}",
            )
        )
    note = (
        f"{megabytes:.0f} MB of JSONL; .bin and .idx are equal (.bin starts with SHA-256 {digest})"
        if len(measured) > 1
        else f"{megabytes:.0f} MB of JSONL"
    )
    return f"{markdown_table(COLUMNS, rows)}\n\n{note}"


# ------------------------------------------------------------------------------------ material


def prepare(folder: Path, input_path: Path | None, megabytes: float) -> tuple[Path, Path]:
    """The text, and the folder of a tokenizer for it."""
    source = input_path or collect_text(folder / "text.jsonl", megabytes=megabytes)
    return source, train_tokenizer(folder / "tokenizer", source)


def collect_text(path: Path, *, megabytes: float) -> Path:
    """Text files of this machine as JSONL, each content once, in a shuffled order.

    Raises RuntimeError if there is less than was asked for.
    """
    if path.exists() and path.stat().st_size >= megabytes * 1e6:
        return path
    roots = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
    files = sorted({found for root in (*roots, *TEXT_ROOTS) for found in _text_files(Path(root))})
    random.Random(0).shuffle(files)
    seen: set[bytes] = set()
    written = 0
    with whole_file(path, "wb") as stream:
        for found in files:
            try:
                data = found.read_bytes()
                record = {"text": data.decode("utf-8"), "source": str(found)}
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen or not data:
                continue
            seen.add(digest)
            written += stream.write(json_line(record))
            if written >= megabytes * 1e6:
                break
        if written < megabytes * 1e6:
            raise RuntimeError(
                f"this machine has {written / 1e6:.0f} MB of text in {', '.join(roots)} and "
                f"{', '.join(TEXT_ROOTS)}, not {megabytes:.0f}: give a file with --input"
            )
    return path


def _text_files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        for name in names:
            found = Path(directory, name)
            if found.suffix in TEXT_ENDINGS and not found.is_symlink():
                try:
                    if 64 <= found.stat().st_size <= LARGEST_FILE_BYTES:
                        yield found
                except OSError:
                    continue


def train_tokenizer(folder: Path, source: Path) -> Path:
    """A byte-level BPE of 32,000 tokens with GPT-2's split, of the source's first 20 MB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if (folder / "tokenizer.json").exists():
        return folder
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    with source.open("rb") as stream:
        lines = stream.readlines(TOKENIZER_TEXT_BYTES)
    backend.train_from_iterator((parse_object(line)["text"] for line in lines), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    config: Mapping[str, str] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(config))
    write_whole(folder / "tokenizer.json", backend.to_str(pretty=True))
    return folder
