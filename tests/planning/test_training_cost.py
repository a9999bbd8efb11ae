"""Time and cost against arithmetic by hand, and the whole report."""

import json

import pytest

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.corpus.mixtures.cost_report import mixture_report
from equilibrium_mcore.models.flops import training_flops_per_token
from equilibrium_mcore.planning.training_cost import Cluster, training_cost


def test_time_and_cost_by_hand():
    model = load_model("llama_1b")
    per_token = training_flops_per_token(model, 2048)
    cost = training_cost(
        model, tokens=10**9, sequence_length=2048, cluster=Cluster(16, 500.0, 0.25, 2.0)
    )
    seconds = 10**9 * per_token / (16 * 500e12 * 0.25)
    assert cost.hours == pytest.approx(seconds / 3600)
    assert cost.device_hours == pytest.approx(16 * cost.hours)
    assert cost.cost == pytest.approx(2.0 * cost.device_hours)
    assert cost.tokens_per_second == pytest.approx(10**9 / seconds)
    # About 6 operations per parameter and token, and attention on top.
    assert 6 * 1.1e9 < per_token < 9 * 1.3e9
    text = "\n".join(cost.lines())
    for figure in (f"{per_token:,}", "16 GPUs * 500 TFLOP/s * 0.25", f"{cost.hours:,.1f} hours"):
        assert figure in text
    twice = training_cost(
        model, tokens=10**9, sequence_length=2048, cluster=Cluster(32, 500.0, 0.25)
    )
    assert twice.hours == pytest.approx(cost.hours / 2) and twice.cost is None
    assert twice.device_hours == pytest.approx(cost.device_hours)


@pytest.mark.parametrize("values", [(0, 989, 0.4), (8, 0, 0.4), (8, 989, 0.0), (8, 989, 1.5)])
def test_a_cluster_that_cannot_be(values):
    with pytest.raises(ValueError, match="at least 1 device, a peak above 0"):
        Cluster(*values)
    with pytest.raises(ValueError, match="must not be negative"):
        Cluster(8, 989, 0.4, -1.0)


def test_report_of_a_mixture_with_its_cost(tmp_path):
    options = {"model": "equilibrium_3b", "gpus": 64, "peak_tflops": 989.0, "price": 2.5}
    text = mixture_report("equilibrium/pretrain", output=tmp_path / "report", **options)
    assert "## Time and cost" in text and (tmp_path / "report/report.md").read_text() == text
    values = json.loads((tmp_path / "report/report.json").read_text())
    cost = values["training_cost"]
    assert cost["tokens"] == 100_663_296_000 and cost["sequence_length"] == 4096
    assert cost["cost"] == pytest.approx(cost["hours"] * 64 * 2.5)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md", "report.json", "datasets.csv", "shares.png",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--peak-tflops, e.g. 989"):
        mixture_report("equilibrium/pretrain", model="equilibrium_3b")
    with pytest.raises(ValueError, match="phases that train on tokens"):
        mixture_report("posttrain/sft/general", **options)
    changed = mixture_report("equilibrium/pretrain", ["metadata.total_tokens=1000"], **options)
    assert "trains on 1,000 tokens" in changed
