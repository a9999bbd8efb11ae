"""A minute of accidents; the campaign itself is `python -m tests.faults`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from equilibrium_mcore.files.json_lines import read_log
from tests.faults import campaign, damaged, kills, scenarios, signals, storage
from tests.faults.__main__ import main
from tests.faults.bench import Bench, BrokenPromiseError, SkippedError
from tests.faults.table import table


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults") / "runs")
    yield made
    made.close()


SAMPLE: dict[str, Callable] = {
    "kills": partial(kills.chain_of_kills, kills=2),
    "kills_of_a_tool": partial(kills.chain_of_tool_kills, kills=2),
    "signals": partial(signals.chain_of_signals, signals=1),
    "disk_full_in_a_run": storage.disk_full_in_a_run,
    "disk_full_in_a_tool": storage.disk_full_in_a_tool,
    "damaged_checkpoint": scenarios.newest_damaged,
    **{f"damaged_file_{number}": damaged.a_file_damaged for number in range(4)},
}


@pytest.mark.parametrize("name", SAMPLE)
def test_promises_hold(bench, name):
    try:
        SAMPLE[name](bench, random.Random(name), name)
    except SkippedError as skipped:
        pytest.skip(str(skipped))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("kind", ["kills", "signals", "storage", "damaged"])
def test_more_promises_hold(bench, kind, number):
    result = campaign.run_case(lambda: bench, bench.folder, 0, kind, number)
    assert result["outcome"] != "broken", result["what"]


# --------------------------------------------------------------------------------- the command


def _breaks_until(mended: list[bool], folder: object, rng: random.Random, name: str) -> str:
    if name == "misuses_1" and not mended:
        raise BrokenPromiseError("planted")
    return f"drawn {rng.random()}"


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """What the results have is not done again, but for broken cases once that is asked for."""
    mended: list[bool] = []
    scenario = partial(_breaks_until, mended)
    scenario.__name__ = "planted"
    kind = campaign.Kind(3, (scenario,), needs_bench=False)
    monkeypatch.setitem(campaign.KINDS, "misuses", kind)
    results = tmp_path / "results.jsonl"
    words = ["--only", "misuses", "--whole", "--results", str(results)]
    assert main([*words, "--cases", "1"]) == 0
    assert main(words) == 1
    assert "| misuses | 2 | 1 | 0 |" in capsys.readouterr().out
    lines = list(read_log(results))
    assert [line["number"] for line in lines] == [0, 1, 2]
    mended.append(True)
    assert main(words) == 1 and list(read_log(results)) == lines
    assert main([*words, "--mended"]) == 0
    assert "| misuses | 3 | 0 | 0 |" in table(read_log(results))
