"""Ranges cover every line once, from any position; compressed and damaged files."""

import gzip
import itertools
import os
import random
import struct

import pytest
import zstandard

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.corpus.filters.optional import require_file
from equilibrium_mcore.corpus.mixtures.readers import local_files
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.chat.conversations import read_conversations
from equilibrium_mcore.data.compression import decompressed_blocks
from equilibrium_mcore.data.inputs import (
    Input,
    RangeCutter,
    line_start,
    list_inputs,
    partition_windows,
    read_span,
)
from equilibrium_mcore.data.jsonl import read_objects
from equilibrium_mcore.data.text_files import lines_of

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
CONTENTS = (b"", b"a", b"a\n", b"aaaa\nb\n\ncc", b"x" * 50 + b"\n" + b"y\n" * 9, b"\n" * 5 + b"z")


@pytest.fixture
def cut(tmp_path):
    """All ranges of inputs, each with its bytes per span."""

    def call(inputs, *, range_bytes, start=(0, 0), partition=1, partitions=1):
        names = (tmp_path / f"spool-{number}" for number in itertools.count())
        windows = partition_windows(inputs, partition=partition, partitions=partitions)
        cutter = RangeCutter(inputs, windows, range_bytes=range_bytes, spool=lambda: next(names))
        return [
            (piece, [(span.number, read_span(span)) for span in piece.spans])
            for piece in cutter.ranges(start)
        ]

    return call


def write_inputs(folder, contents, ending="") -> list[Input]:
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"{number}.jsonl{ending}")
        paths[-1].write_bytes(COMPRESS[ending](content))
    return list_inputs(paths)


def joined(pieces, number):
    return b"".join(data for _, spans in pieces for which, data in spans if which == number)


@pytest.mark.parametrize("ending", list(COMPRESS))
@pytest.mark.parametrize("range_bytes", [1, 2, 3, 7, 30, 100_000])
def test_ranges_cover_whole_lines_from_every_position(tmp_path, cut, ending, range_bytes):
    inputs = write_inputs(tmp_path, CONTENTS, ending)
    pieces = cut(inputs, range_bytes=range_bytes)
    for number, content in enumerate(CONTENTS):
        assert joined(pieces, number) == content
    for _, spans in pieces:
        for which, data in spans:
            assert data.endswith(b"\n") or CONTENTS[which].endswith(data)
    if not ending:
        assert sum(piece.disk_bytes for piece, _ in pieces) == sum(item.size for item in inputs)
    for index, (piece, _) in enumerate(pieces):
        again = cut(inputs, range_bytes=range_bytes, start=piece.after)
        rest = pieces[index + 1 :]
        for number in range(len(CONTENTS)):
            assert joined(again, number) == joined(rest, number)


def test_small_files_share_a_range(tmp_path, cut):
    inputs = write_inputs(tmp_path, [b"line\n"] * 100)
    pieces = cut(inputs, range_bytes=250)
    assert [len(piece.spans) for piece, _ in pieces] == [50, 50]
    assert all(span.head for piece, _ in pieces for span in piece.spans)


@pytest.mark.parametrize("ending", list(COMPRESS))
@pytest.mark.parametrize("partitions", [1, 2, 3, 5, 40])
def test_partitions_hold_every_line_once(tmp_path, cut, ending, partitions):
    inputs = write_inputs(tmp_path, CONTENTS, ending)
    parts = [
        cut(inputs, range_bytes=10, partition=k, partitions=partitions)
        for k in range(1, partitions + 1)
    ]
    for number, content in enumerate(CONTENTS):
        assert b"".join(joined(pieces, number) for pieces in parts) == content
        for data in (joined(pieces, number) for pieces in parts[:-1]):
            assert not data or data.endswith(b"\n") or content.endswith(data)


def test_partitions_are_even(tmp_path):
    inputs = write_inputs(tmp_path, [b"0123456789\n" * 1000, b"0123456789\n" * 3000])
    for k in range(1, 5):
        windows = partition_windows(inputs, partition=k, partitions=4)
        assert sum(end - start for start, end in windows) == pytest.approx(11_000, abs=11)


def test_line_start(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"ab\n\ncd")
    with path.open("rb") as stream:
        assert [line_start(stream, offset) for offset in range(7)] == [0, 3, 3, 3, 4, 6, 6]


@pytest.mark.parametrize(("ending", "name"), [(".gz", "gzip"), (".zst", "zstd")])
def test_several_members_are_one_content(tmp_path, ending, name):
    path = tmp_path / f"two{ending}"
    path.write_bytes(COMPRESS[ending](b"first\n") + COMPRESS[ending](b"second\n"))
    content = b"".join(block for block, _ in decompressed_blocks(path, name))
    assert content == b"first\nsecond\n"
    path.write_bytes(COMPRESS[".gz"](b"first\n") + b"\0" * 1000)
    assert b"".join(block for block, _ in decompressed_blocks(path, "gzip")) == b"first\n"


@pytest.mark.parametrize(("ending", "name"), [(".gz", "gzip"), (".zst", "zstd")])
def test_damaged_files_are_named(tmp_path, ending, name):
    whole = COMPRESS[ending](bytes(range(256)) * 4000)
    path = tmp_path / f"bad{ending}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path} is cut short.*{name}"):
        list(decompressed_blocks(path, name))
    damaged = bytearray(whole)
    damaged[-3] ^= 0xFF
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{path} is (damaged|cut short)"):
        list(decompressed_blocks(path, name))
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(ValueError, match=rf"{path} is not {name}, as its name says"):
        list_inputs([path])


def test_compression_is_told_by_content(tmp_path):
    path = tmp_path / "no_ending"
    path.write_bytes(COMPRESS[".zst"](b"x\n"))
    assert list_inputs([path])[0].compression == "zstd"


def test_a_file_that_became_shorter(tmp_path, cut):
    inputs = write_inputs(tmp_path, [b"line\n" * 100])
    inputs[0].path.write_bytes(b"line\n" * 10)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        cut(inputs, range_bytes=10_000)


def test_missing_and_double_inputs(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"b2, .* and 3 more"):
        list_inputs([tmp_path / "a", *(tmp_path / f"b{n}" for n in range(8))])
    with pytest.raises(ValueError, match="more than once"):
        list_inputs([tmp_path / "a", tmp_path / "a"])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "hard")
    for other in ("link", "hard"):
        both = [tmp_path / "a", tmp_path / other]
        with pytest.raises(ValueError, match=rf"{other} \(which is .*/a\) more than once.*--allow"):
            list_inputs(both)
        assert [item.path for item in list_inputs(both, allow_repeats=True)] == both


def skippable(content: bytes) -> bytes:
    """A frame that readers of Zstandard pass over."""
    return struct.pack("<II", 0x184D2A57, len(content)) + content


@pytest.mark.parametrize("size", [1, 100, 60_000])
def test_skippable_frames_of_zstandard(tmp_path, cut, size):
    generator = random.Random(size)
    lines = b"".join(b"%d\n" % generator.getrandbits(64) for _ in range(size))
    frame, path = COMPRESS[".zst"](lines), tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable(b"index") + frame + skippable(b"") + frame + skippable(b"end"))
    (item,) = list_inputs([path])
    assert item.compression == "zstd"
    assert joined(cut([item], range_bytes=40_000), 0) == lines * 2
    assert [line for _, line in lines_of(path)] == lines.split() * 2
    path.write_bytes(skippable(b"index") + frame + skippable(b"end")[:-1])
    with pytest.raises(ValueError, match="cut short"):
        list(lines_of(path))


def test_lines_of_a_compressed_file_with_a_plain_name(tmp_path):
    path = tmp_path / "plain.jsonl"
    for ending in (".gz", ".zst"):
        path.write_bytes(COMPRESS[ending](b"one\n") + COMPRESS[ending](b"two\n"))
        assert list(lines_of(path)) == [(1, b"one"), (2, b"two")]


def test_whatever_reads_text_refuses_a_pipe(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)  # opening it would wait for a writer
    mixed = DatasetConfig(name="a", source=str(pipe), mix_ratio=1)
    readers = {
        "lines": lambda: list(lines_of(pipe)),
        "objects": lambda: list(read_objects(pipe)),
        "conversations": lambda: list(read_conversations(pipe)),
        "references": lambda: require_file(pipe, wanted_by="f", key="k", advice="a"),
        "mixture": lambda: local_files(mixed),
        "tokenizer": lambda: train_tokenizer(
            inputs=[pipe], output=tmp_path / "a.model", vocab_size=600
        ),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match=r"pipe\.jsonl is no file but a pipe"):
            read()
            pytest.fail(name)


def test_a_pipe_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(ValueError, match=f"{tmp_path / 'pipe'} is no file but a pipe"):
        list_inputs([tmp_path / "pipe"])
