"""A tokenizer is trained on the content of its inputs, however they are stored."""

import gzip
import json
import struct

import zstandard

from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from tests.support.made_up_text import made_up_code


def test_compressed_inputs_give_the_tokenizer_of_plain_ones(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in made_up_code(300)]
    half, compress = len(lines) // 2, zstandard.ZstdCompressor().compress
    parts = b"".join(lines[:half]), b"".join(lines[half:])
    skipped = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    contents = {
        "plain.jsonl": b"".join(parts),
        "members.jsonl.gz": b"".join(map(gzip.compress, parts)),
        "frames.jsonl.zst": skipped + b"".join(map(compress, parts)),
        "no_ending": gzip.compress(b"".join(parts)),
    }
    # Less than all of it, so that what is drawn depends on how large the content is.
    megabytes = len(contents["plain.jsonl"]) / 2e6
    models = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        output = tmp_path / f"{name}.model"
        done = train_tokenizer(
            inputs=[tmp_path / name], output=output, vocab_size=600, max_megabytes=megabytes
        )
        models[name] = output.read_bytes(), done.trained_bytes
    assert len(set(models.values())) == 1
