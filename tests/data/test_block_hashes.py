"""Hashes in the manifest: those of the files, however they came to be, and what they catch."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.data import SourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.data import block_hashes
from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.block_hashes import BLOCK_BYTES, FileBlocks, sample_blocks
from equilibrium_mcore.data.indexed_files import Manifest, dataset_paths, read_manifest
from equilibrium_mcore.data.verify import verify_datasets

LENGTH = 5000  # tokens of a document


def manifest_of(tokenizer, writer) -> Manifest:
    return Manifest(
        tokenizer_type=tokenizer.kind,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=True,
        key="text",
        documents=writer.documents,
        tokens=writer.tokens,
        largest_token=writer.largest_token,
        dtype=writer.dtype.name,
        skipped_lines=0,
        inputs=[],
    )


@pytest.fixture
def write(tmp_path, tokenizer):
    """A dataset of so many documents, added a few at a time."""

    def call(name: str, documents: int, seed: int = 0, stop_after: int = 0) -> Path:
        prefix, generator = tmp_path / name, np.random.default_rng(seed)
        tokens = generator.integers(3, 500, documents * LENGTH, dtype=np.uint16).reshape(-1, LENGTH)
        writer, state = IndexedWriter(prefix, np.uint16), None
        for begin in range(0, documents, 7):
            if stop_after and begin >= stop_after:  # the run dies, and is resumed from its journal
                state, stop_after = writer.state, 0
                writer.add(tokens[:3].tobytes(), np.full(3, LENGTH, np.int32))  # after the journal
                writer.keep()
                writer = IndexedWriter(prefix, np.uint16)
                writer.rewind(state)
            piece = tokens[begin : begin + 7]
            writer.add(piece.tobytes(), np.full(len(piece), LENGTH, np.int32))
        with writer:
            writer.finish()
            writer.stage(manifest_of(tokenizer, writer))
            writer.publish()
        return prefix

    return call


def plain_hashes(path: Path) -> list[str]:
    data = path.read_bytes()
    pieces = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    return [hashlib.sha256(piece).hexdigest()[:32] for piece in pieces]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        (value,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([value ^ 1]))


def test_they_are_those_of_the_files_also_after_a_kill(write):
    documents = int(2.4 * BLOCK_BYTES / 2 / LENGTH)
    straight = write("straight", documents)
    resumed = write("resumed", documents, stop_after=documents // 2)
    for prefix in (straight, resumed):
        hashes = read_manifest(prefix).hashes
        binary, index, _ = dataset_paths(prefix)
        assert hashes.bin == plain_hashes(binary) and len(hashes.bin) == 3
        assert hashes.idx == plain_hashes(index)
    assert read_manifest(straight) == read_manifest(resumed)
    lines = []
    assert verify_datasets([straight], out=lines.append) and "4 blocks" in lines[0]
    flip(dataset_paths(straight)[0], BLOCK_BYTES + 5)
    assert not verify_datasets([straight, resumed], out=lines.append)
    assert f"{straight}.bin: bytes 16,777,216 to 33,554,432 are not those" in lines[1]
    assert lines[2].startswith(f"{resumed}: whole") and len(lines) == 3


def test_a_journal_of_before_has_no_hashes_and_they_are_made(write, tmp_path, tokenizer):
    whole = write("whole", 40)
    with IndexedWriter(tmp_path / "old", np.uint16) as writer:
        tokens = np.frombuffer(dataset_paths(whole)[0].read_bytes(), np.uint16)
        half = tokens[: 20 * LENGTH]
        writer.add(half.tobytes(), np.full(20, LENGTH, np.int32))
        state = writer.state
        writer.keep()
    with IndexedWriter(tmp_path / "old", np.uint16) as writer:
        writer.rewind(type(state)(state.documents, state.sequences, state.tokens, 499))
        writer.add(tokens[half.size :].tobytes(), np.full(20, LENGTH, np.int32))
        writer.finish()
        writer.stage(manifest_of(tokenizer, writer))
        writer.publish()
    assert read_manifest(tmp_path / "old").hashes == read_manifest(whole).hashes


def test_the_tool_checks_all_and_says_which(write, repository):
    good, bad = write("good", 9), write("bad", 9, seed=1)
    gone, bare = write("gone", 9, seed=2), write("bare", 9, seed=3)
    flip(dataset_paths(bad)[1], 60)
    os.truncate(dataset_paths(gone)[0], 1000)
    dataset_paths(bare)[2].unlink()
    tool = [sys.executable, str(repository / "tools" / "preprocess_data.py"), "--verify"]
    done = subprocess.run([*tool, f"{good}.bin"], capture_output=True, text=True, cwd=good.parent)
    assert done.returncode == 0 and f"{good}: whole (2 blocks" in done.stdout
    done = subprocess.run([*tool, good, bad, gone, bare, "no"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and not done.stderr and len(lines) == 5
    assert lines[0].startswith(f"{good}: whole")
    assert f"error: {bad}.idx: bytes 0 to {os.stat(f'{bad}.idx').st_size:,} are not" in lines[1]
    assert f"error: {gone}.bin is cut short" in lines[2]
    assert f"error: {bare} has no manifest" in lines[3] and "no.idx does not exist" in lines[4]


# ------------------------------------------------------------------------------------ opening


@pytest.fixture
def open_blend(two_sources):
    """Opens a blend of these datasets, in either order."""

    def call(*prefixes, order="ledger", **changes):
        sources = [SourceConfig(name=p.name, prefix=p, weight=1.0) for p in prefixes]
        data = two_sources.model_copy(update={"sources": sources, "order": order})
        arguments = {"sequence_length": 64, "train_samples": 20, "validation_samples": 0, "seed": 5}
        return build_datasets(data, **(arguments | changes)).train

    return call


@pytest.mark.parametrize("order", ["ledger", "megatron"])
def test_damage_is_refused_before_training(write, open_blend, order):
    good, bad = write("good", 40), write("bad", 40, seed=1)
    assert open_blend(good, bad, order=order)
    flip(dataset_paths(bad)[0], 123_456)
    with pytest.raises(ConfigError, match=r"source 'bad': .*bad\.bin: bytes 0 to 400,000 are not"):
        open_blend(good, bad, order=order)


def test_another_dataset_under_the_name_is_refused_however_large(write, open_blend, monkeypatch):
    monkeypatch.setattr(block_hashes, "SAMPLED_BYTES", 0)  # as if blocks of others were drawn
    good, other = write("good", 40), write("other", 40, seed=1)
    os.replace(f"{other}.bin", f"{good}.bin")
    with pytest.raises(ConfigError, match=r"good\.bin and good\.idx are not what good\.json"):
        open_blend(good)
    os.replace(f"{other}.json", f"{good}.json")
    open_blend(good)
    values = json.loads(Path(f"{good}.json").read_text())
    values["hashes"]["bin"].append("00")
    Path(f"{good}.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"good\.bin has 400,000 bytes, but .* 2 blocks"):
        open_blend(good)


def test_what_is_looked_at_is_bounded_and_another_each_time(tmp_path):
    files = [FileBlocks(tmp_path / f"{n}", ["0"] * 1000, 1 << 20, 1000 << 20) for n in range(3000)]
    few = sample_blocks(files, seed="5 0")
    assert 0 < len(few) <= block_hashes.SAMPLED_BLOCKS
    assert sum(block.end - block.start for block in few) <= block_hashes.SAMPLED_BYTES
    assert few == sample_blocks(files, seed="5 0") != sample_blocks(files, seed="5 100")
    all_of_few = sample_blocks([FileBlocks(tmp_path / "x", ["0"] * 9, 100, 850)], seed="1")
    assert sorted((b.start, b.end) for b in all_of_few)[-1] == (800, 850) and len(all_of_few) == 9


def test_datasets_without_hashes_open_with_one_line(write, open_blend, two_sources, capsys):
    old = write("old", 9)
    values = json.loads(Path(f"{old}.json").read_text())
    del values["hashes"], values["partition"]
    Path(f"{old}.json").write_text(json.dumps(values))
    open_blend(write("new", 9, seed=1), old, two_sources.sources[0].prefix)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 3 sources have no hashes" in line
    open_blend(write("other", 9))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------ resuming


def test_a_change_that_the_fingerprint_misses_is_noticed_at_a_resume(write, open_blend, tmp_path):
    first = write("set", 40)
    ledger = open_blend(first).cursor_at(0)
    ledger.skip(3)
    state = json.loads(json.dumps(ledger.state()))
    assert open_blend(first, ledger_state=state, consumed_samples=3)
    changed = np.fromfile(f"{first}.bin", np.uint16)
    changed[60_000] ^= 1
    for path in dataset_paths(first):
        path.unlink()
    with IndexedWriter(first, np.uint16) as writer:
        writer.add(changed.tobytes(), np.full(40, LENGTH, np.int32))
        writer.finish()
        writer.publish()
    now = open_blend(first).cursor_at(0).state()["sources"]["set"]
    assert now["fingerprint"] == state["sources"]["set"]["fingerprint"] and not now["content"]
    old = {**state["sources"]["set"]}
    again = write("again", 40)
    merge_datasets(prefixes=[again], output_prefix=tmp_path / "copy")
    same = state | {"sources": {"copy": old}, "cursors": {"copy": state["cursors"]["set"]}}
    assert open_blend(tmp_path / "copy", ledger_state=same, consumed_samples=3)
    other = write("other", 40, seed=1)
    facts = open_blend(other).cursor_at(0).state()["sources"]["other"]
    near = {**facts, "content": old["content"]}  # as far as a sample of it can tell, the same
    wrong = state | {"sources": {"other": near}, "cursors": {"other": state["cursors"]["set"]}}
    with pytest.raises(ConfigError, match="is not the dataset that the run has read so far"):
        open_blend(other, ledger_state=wrong, consumed_samples=3)
    before = {key: value for key, value in near.items() if key != "content"}  # an old checkpoint
    fits = state | {"sources": {"other": before}, "cursors": {"other": state["cursors"]["set"]}}
    assert open_blend(other, ledger_state=fits, consumed_samples=3)


def test_damage_is_not_merged_under_new_hashes(write, tmp_path):
    parts = [write("one", 9), write("two", 9, seed=1)]
    merge_datasets(prefixes=parts, output_prefix=tmp_path / "both")
    assert verify_datasets([tmp_path / "both"], out=lambda text: None)
    for which, at in ((0, 4000), (1, 60)):
        flip(dataset_paths(parts[1])[which], at)
        with pytest.raises(ValueError, match=r"two\.(bin|idx): bytes 0 to .* are not those"):
            merge_datasets(prefixes=parts, output_prefix=tmp_path / "damaged")
        flip(dataset_paths(parts[1])[which], at)
    assert not list(tmp_path.glob("damaged*"))
