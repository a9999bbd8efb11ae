"""Memory of the preprocessing does not grow with the input."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.byte_level import train_byte_level

CHILD = """
import sys
from pathlib import Path
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.preprocess import preprocess
preprocess(
    inputs=[Path(sys.argv[1])],
    output_prefix=Path(sys.argv[2]),
    tokenizer=TokenizerConfig(type="HuggingFaceTokenizer", model=Path(sys.argv[3])),
    append_eod=True, workers=1, range_bytes=1 << 20,
)
"""


def peak_mib(repository: Path, *arguments: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    process = os.posix_spawn(sys.executable, command, environment)
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["long texts", "many tiny texts"])
def test_eight_times_the_input_needs_the_same_memory(tmp_path, repository, texts, kind):
    folder = train_byte_level(tmp_path / "bpe", texts, "gpt2")
    if kind == "long texts":
        block = [json.dumps({"text": "\n".join(texts[i : i + 40])}) for i in range(0, 400, 40)]
        repeats = 20_000_000 // sum(map(len, block))
    else:
        block, repeats = ['{"text": "a b"}'] * 1000, 400
    data = "".join(f"{line}\n" for line in block) * repeats
    once, eight_times = tmp_path / "once.jsonl", tmp_path / "eight.jsonl"
    once.write_text(data)
    with eight_times.open("w") as stream:
        stream.writelines([data] * 8)
    small = peak_mib(repository, once, tmp_path / "once", folder)
    large = peak_mib(repository, eight_times, tmp_path / "eight", folder)
    grown = (eight_times.stat().st_size - once.stat().st_size) / 2**20
    print(f"{kind}: {small:.0f} MiB, with {grown:.0f} MiB more of input {large:.0f} MiB")
    assert large - small < 16
