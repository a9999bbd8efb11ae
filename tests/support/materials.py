"""Files as people have them, good and bad, for commands that are called in the wrong way."""

from __future__ import annotations

import atexit
import functools
import gzip
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.load import save_config
from tests.support.attempts import attempt
from tests.support.runs import MODEL, make_data, tiny_run

SMALL = {**MODEL, "layer_pattern": "M-", "hidden_size": 32}


@dataclass(frozen=True)
class Materials:
    """A small dataset with its text and tokenizer, a run's file, and a run that has trained."""

    folder: Path
    data: dict[str, Any]  # the `data` section of a run
    config: Path  # a run's file
    run: Path  # its output directory, with a checkpoint

    def values(self, output: Path) -> dict[str, Any]:
        """The run as plain values, with another output directory."""
        config = _config(self.data, output)
        return config.model_dump(mode="json")


@functools.cache
def materials() -> Materials:
    """Made once for a process, and removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="materials_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "data").mkdir()
    data = make_data(folder / "data")
    run = folder / "run"
    config = folder / "run.yaml"
    save_config(_config(data, run), config)
    trained = attempt(train, [str(config), "training.stop_after_steps=1"])
    assert trained.status == 0, trained.text
    return Materials(folder, data, config, run)


def train(arguments: list[str]) -> int:
    """`python -m equilibrium_mcore.train`."""
    from equilibrium_mcore.train import main

    return main(arguments)


def _config(data: dict[str, Any], output: Path) -> Any:
    small = {"steps": 4, "sequence_length": 32, "global_batch_size": 2}
    return tiny_run(data, output, model=SMALL, training=small)


def menagerie(folder: Path) -> dict[str, Path]:
    """Paths that some command will not like, by what they are."""
    folder.mkdir(parents=True)
    paths = {
        "missing": folder / "not there.jsonl",
        "missing_folder": folder / "no" / "such" / "folder" / "file.jsonl",
        "empty": folder / "empty.jsonl",
        "folder": folder / "a folder",
        "folder_named_like_a_file": folder / "folder.yaml",
        "binary": folder / "binary.jsonl",
        "text": folder / "Grüße – 世界.txt",
        "yaml": folder / "list.yaml",
        "json": folder / "tokenizer.json",
        "wrong_json": folder / "wrong" / "tokenizer.json",
        "model": folder / "tokenizer.model",
        "blank_lines": folder / "blank.jsonl",
        "lines": folder / "lines.jsonl",
        "other_lines": folder / "other.jsonl",
        "packed": folder / "packed.jsonl.gz",
        "cut_packed": folder / "cut.jsonl.gz",
        "pipe": folder / "pipe.jsonl",
        "loop": folder / "loop.jsonl",
        "dangling": folder / "dangling.yaml",
        "long": folder / ("x" * 300),
        "nul_device": Path("/dev/null"),
        "index": folder / "set.idx",
        "prefix": folder / "set",
        "parquet": folder / "table.parquet",
    }
    write = {
        "empty": b"",
        "binary": bytes(range(256)) * 20,
        "text": "Grüße, 世界\n".encode(),
        "yaml": b"- 1\n- 2\n",
        "json": b"{}",
        "model": b"\x00not a model",
        "blank_lines": b"\n\n",
        "lines": b'{"text": "a line"}\n{"text": 3}\n[]\n{"text": null}\n',
        "other_lines": b'{"words": "no text here"}\n',
        "packed": gzip.compress(b'{"text": "packed"}\n'),
        "cut_packed": gzip.compress(b'{"text": "packed"}\n' * 50)[:-9],
        "index": b"MMIDIDX\x00\x00" + b"\xff" * 40,
        "parquet": b"PAR1 no more",
    }
    for name, content in write.items():
        paths[name].write_bytes(content)
    (folder / "set.bin").write_bytes(b"\x01\x02")
    for name in ("folder", "folder_named_like_a_file"):
        paths[name].mkdir()
    paths["wrong_json"].parent.mkdir()
    paths["wrong_json"].write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    os.mkfifo(paths["pipe"])
    paths["loop"].symlink_to(paths["loop"])
    paths["dangling"].symlink_to(folder / "gone.yaml")
    return paths


def state_of(*folders: Path) -> dict[str, str]:
    """Every file under the folders, with a hash of what it holds."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
