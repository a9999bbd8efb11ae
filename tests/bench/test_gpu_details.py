"""How long a device was busy, and what is said of what could not be measured."""

from __future__ import annotations

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.parallel import accelerator

accelerator.install()

from tools.bench.measure import gpu_details  # noqa: E402
from tools.bench.measure.gpu import REHEARSAL  # noqa: E402
from tools.bench.measure.gpu_details import details_table, measure_details  # noqa: E402
from tools.bench.measure.gpu_layers import measure_layer  # noqa: E402
from tools.bench.measure.timing import busy  # noqa: E402


def test_kernels_that_overlap_count_once():
    assert busy([]) == 0
    assert busy([(5, 6), (0, 2), (1, 3)]) == 4
    assert busy([(0, 10), (2, 3), (4, 5)]) == 10


def test_what_fails_is_named_and_the_rest_measured(monkeypatch):
    def fails(*arguments, **named):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_details, "_profile", fails)
    monkeypatch.setattr(gpu_details, "measure_layer", fails)
    told = []
    found = measure_details(REHEARSAL, done=lambda values: told.append(len(values)))
    assert told == list(range(1, len(found) + 1)) and found["launch"]["microseconds"] > 0
    assert found["profile"] == {"not run": "RuntimeError: no such kernel"}
    assert all(value > 0 for value in found["Newton-Schulz"].values())
    assert "no such kernel" in details_table(found)


def test_a_layer_is_measured():
    model = load_model(REHEARSAL.model)
    found = measure_layer(model, "M", sequence_length=64, training={}, repeats=2)
    assert found["layer"] == "mamba" and found["milliseconds"] > 0
    assert found["operators"] and found["Python"]
