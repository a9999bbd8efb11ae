"""Mixtures: the roadmap's form, every rule with a case that breaks it, the shipped files."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from equilibrium_mcore.config import describe
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.mixture import PHASE_KINDS
from equilibrium_mcore.config.mixture_files import SHELF
from equilibrium_mcore.config.mixture_rules import (
    MIXTURE_RULES,
    effective_shares,
    epoch_problem,
    stages_of,
)
from equilibrium_mcore.config.yaml_io import to_yaml

SHIPPED = sorted(str(p.relative_to(SHELF).with_suffix("")) for p in SHELF.glob("*/**/*.yaml"))

TEMPLATE = """
metadata:
  phase: "pretrain_phase1"
  total_tokens: 2_000_000_000_000  # 2T tokens
  steps: 500_000
  description: "Foundation phase with balanced general knowledge"
  max_seq_length: 4096

datasets:
  - name: "dataset_identifier"
    source: "huggingface/dataset-name"  # or local path
    mix_ratio: 0.30  # 30% of total tokens
    estimated_tokens: 600_000_000_000
    format: "jsonl"  # or parquet, arrow, etc.
    text_field: "content"  # field containing text
    splits: ["train"]  # which splits to use
    filters:
      - type: "language"
        languages: ["en"]
      - type: "quality"
        min_length: 100
        max_length: 100000
      - type: "deduplication"
        method: "exact"  # or "minhash", "simhash"
      - type: "pii_removal"
        enabled: true
    sampling:
      method: "uniform"  # or "weighted", "curriculum"
      temperature: 1.0
  - {name: rest, source: other/dataset, mix_ratio: 0.7}

validation:
  ratio: 0.01  # 1% for validation
  seed: 42
"""


@pytest.fixture
def load(tmp_path):
    """`load_mixture` of values, with the template's shape."""

    def call(values: dict | str, *overrides: str, **options):
        file = tmp_path / "mine.yaml"
        file.write_text(values if isinstance(values, str) else to_yaml(values))
        return load_mixture(file, overrides, **options)

    return call


def good() -> dict:
    return copy.deepcopy(
        {
            "metadata": {"phase": "pretrain", "total_tokens": 1000},
            "datasets": [
                {"name": "a", "source": "a.jsonl", "mix_ratio": 0.75},
                {"name": "b", "source": "b.jsonl", "mix_ratio": 0.25},
            ],
        }
    )


def changed(place: str, value, *more) -> dict:
    values = good()
    for key, item in [(place, value), *zip(more[::2], more[1::2], strict=True)]:
        *path, last = [int(p) if p.isdecimal() else p for p in key.split(".")]
        inside = values
        for part in path:
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else inside[part]
        inside[last] = item
    return values


def test_the_roadmaps_template_is_a_mixture(load):
    mixture = load(TEMPLATE)
    assert mixture.name == "mine" and mixture.kind == "text"
    assert [f.type for f in mixture.datasets[0].filters] == [
        "language", "quality", "deduplication", "pii_removal",
    ]  # fmt: skip
    assert effective_shares(mixture) == pytest.approx([0.3, 0.7])


def test_a_phase_of_any_name_says_its_kind(load):
    chats = {"columns": {"messages": "m"}}
    values = changed("metadata.phase", "cooldown, week 2", "metadata.kind", "text")
    assert load(values).kind == "text"
    values = changed("metadata.phase", "grpo", "metadata.kind", "prompt")
    values["datasets"] = [dataset | chats for dataset in values["datasets"]]
    assert load(values, "metadata.total_tokens=null").kind == "prompt"
    values = changed("metadata.phase", "pretrain", "metadata.kind", "conversation")
    values["datasets"] = [dataset | chats for dataset in values["datasets"]]
    assert load(values, "metadata.total_tokens=null").kind == "conversation"  # kind goes first
    with pytest.raises(ConfigError, match=r"metadata\.phase='cooldown'.*set metadata\.kind to"):
        load(changed("metadata.phase", "cooldown"))


def test_overrides_stand_ins_and_temperature(load):
    values = changed(
        "datasets.0.source", "owner/name", "datasets.0.subset", "x", "datasets.0.streaming", True
    )
    mixture = load(
        values,
        "datasets.1.max_epochs=2",
        "metadata.total_tokens=5",
        local=["a=/tmp/a.parquet"],
        temperature=2.0,
    )
    first, second = mixture.datasets
    assert (first.source, first.subset, first.streaming) == ("/tmp/a.parquet", None, False)
    assert (second.max_epochs, mixture.metadata.total_tokens) == (2.0, 5)
    a, b = 0.75**0.5, 0.25**0.5
    assert effective_shares(mixture) == pytest.approx([a / (a + b), b / (a + b)])
    with pytest.raises(ConfigError, match="no dataset 'c'; it has a, b"):
        load(values, local=["c=x"])
    with pytest.raises(ConfigError, match="write NAME=PATH"):
        load(values, local=["a"])


BROKEN = {
    "ratios_sum_to_one": (
        [changed("datasets.0.mix_ratio", 0.7)],
        r"0\.7 \(a\) \+ 0\.25 \(b\) = 0\.95, must sum to 1; change them by \+0\.05",
    ),
    "names_are_file_names": (
        [changed("datasets.0.name", "a/b"), changed("datasets.1.name", "A")],
        "it names files|two datasets have this name",
    ),
    "a_budget_fits_its_phase": (
        [changed("metadata.total_tokens", None), changed("metadata.total_examples", 5)],
        "total_tokens",
    ),
    "sampling_has_its_field": (
        [
            changed("datasets.0.sampling", {"method": "weighted"}),
            changed("datasets.0.sampling",
                    {"method": "curriculum", "field": "x", "boundaries": [2.0, 1.0]}),
            changed("datasets.0.sampling", {"boundaries": [1.0]}),
        ],
        "needs the field|must rise|only method 'curriculum'",
    ),
    "stages_agree": (
        [changed("datasets.0.sampling", {"method": "curriculum", "field": "x", "stages": 2},
                 "datasets.1.sampling", {"method": "curriculum", "field": "x", "stages": 3})],
        "a 2, b 3: all curricula",
    ),
    "temperatures_agree": (
        [changed("datasets.0.sampling", {"temperature": 2.0})],
        r"2 \(a\), 1 \(b\).*--temperature",
    ),
    "estimates_allow_the_epochs": (
        [changed("datasets.0.estimated_tokens", 100)],
        r"a: share 0\.75 of 1,000 tokens is 750; it holds 100, of which 99 are for training, so "
        r"7\.58 epochs would be needed, and max_epochs is 4\..*at most 528 tokens",
    ),
    "text_comes_from_one_place": (
        [changed("datasets.0.text_template", "plain"), changed("datasets.0.text_template", "{a")],
        "text_template",
    ),
    "columns_fit_the_phase": (
        [changed("metadata.phase", phase, "metadata.total_tokens", None)
         for phase, kind in PHASE_KINDS.items() if kind != "text"],
        "needs columns",
    ),
    "filters_fit_the_phase": (
        [changed("metadata.phase", "posttrain_rlaif", "datasets.0.columns", {"prompt": "p"},
                 "datasets.1.columns", {"prompt": "p"}, "datasets.0.filters", [{"type": "c4"}])],
        "c4 .*removes lines",
    ),
    "hub_settings_are_for_the_hub": (
        [changed("datasets.0.data_files", "x/*")],
        "set format to jsonl, parquet or arrow",
    ),
}  # fmt: skip


def test_every_rule_has_a_case():
    assert list(BROKEN) == [rule.__name__ for rule in MIXTURE_RULES]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_says_its_way_out(load, name):
    cases, message = BROKEN[name]
    (rule,) = [rule for rule in MIXTURE_RULES if rule.__name__ == name]
    assert list(rule(load(good()))) == []
    for values in cases:
        with pytest.raises(ConfigError, match=message):
            load(values)


def test_unknown_keys_suggest_the_near_one(load):
    with pytest.raises(ConfigError, match="did you mean 'mix_ratio'"):
        load(changed("datasets.0.mix_ration", 0.5))
    with pytest.raises(ConfigError, match=r"datasets\.0\.filters\.0.*min_lenght"):
        load(changed("datasets.0.filters", [{"type": "length", "min_lenght": 5}]))
    with pytest.raises(ConfigError, match="there are .*equilibrium/pretrain"):
        load_mixture("no/such")


def test_epochs_at_the_cap_are_allowed(load):
    (dataset, _) = load(good()).datasets
    facts = {"share": 0.5, "total_tokens": 8000, "ratio": 0.0}
    assert epoch_problem(dataset, held_tokens=1000, **facts) is None
    assert "4.00 epochs" in epoch_problem(dataset, held_tokens=999, **facts)


def test_the_document_has_every_setting():
    document = describe.MIXTURES_DOCUMENT.read_text(encoding="utf-8")
    assert describe.up_to_date(document, describe.describe_mixture) == document, (
        "docs/reference/mixtures.md differs from the settings: run "
        "`python -m equilibrium_mcore.config.describe`"
    )
    assert "### A mixture" in document and "### `datasets.0.sampling`" in document


# -------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_mixture_is_legal(name):
    mixture = load_mixture(name)
    assert mixture.name == name.replace("/", "_")
    assert sum(effective_shares(mixture)) == pytest.approx(1)
    *folder, _ = name.split("/")
    names = {
        "posttrain/ppo": "posttrain_reward_model",
        "equilibrium": "pretrain",
        "examples": "pretrain",
    }
    place = "/".join(folder)
    if folder[0] != "recipes":  # a recipe goes through several phases
        assert mixture.metadata.phase == names.get(place, place.replace("/", "_"))
    assert all(stages_of(dataset) == 1 for dataset in mixture.datasets)
    text = (SHELF / f"{name}.yaml").read_text()
    for dataset in mixture.datasets:
        assert f"- name: {dataset.name}\n" in text and dataset.filters


def test_every_phase_of_the_roadmap_is_shipped():
    phases = {load_mixture(name).metadata.phase for name in SHIPPED}
    assert phases == PHASE_KINDS.keys()
    assert len(SHIPPED) == 21


def test_problems_with_true_answers_are_shipped():
    """Of GSM8K's, MATH's and code's form, each with the column that an answer is judged by."""
    names = [name for name in SHIPPED if name.startswith("posttrain/grpo/")]
    datasets = [dataset for name in names for dataset in load_mixture(name).datasets]
    assert {"gsm8k", "math", "mbpp"} <= {dataset.name for dataset in datasets}
    assert all(dataset.columns.truth for dataset in datasets)


def test_the_guide_lists_every_shipped_mixture():
    guide = (SHELF / "../../docs/guides/DATASET_MIXING_GUIDE.md").read_text(encoding="utf-8")
    table, listed = guide.partition("## The shipped mixtures")[2], set()
    for cell in re.findall(r"^\| (`[^|]+) \|", table, re.M):
        folder = ""
        for code in re.findall(r"`([^`]+)`", cell):
            folder = code.rpartition("/")[0] if "/" in code else folder
            listed.add(f"{folder}/{code.rpartition('/')[2]}")
    made_for_others = ("examples/", "recipes/")  # which their own documents explain
    assert listed == {name for name in SHIPPED if not name.startswith(made_for_others)}


def test_equilibriums_shares():
    """30% mathematics, 30% code, 20% economics, 15% general, 5% science."""
    text = (SHELF / "equilibrium/pretrain.yaml").read_text()
    groups = {}
    for part in text.split("# ---- ")[1:]:
        head, _, rest = part.partition("\n")
        name, _, share = head.partition(": ")
        found = [float(line.split(": ")[1]) for line in rest.splitlines() if "mix_ratio" in line]
        assert sum(found) == pytest.approx(float(share))
        groups[name] = float(share)
    assert groups == {
        "mathematics": 0.3, "code": 0.3, "economics": 0.2, "general": 0.15, "science": 0.05,
    }  # fmt: skip
    run = Path(SHELF, "../runs/pretrain_3b.yaml").read_text()
    assert "steps: 24000" in run and "global_batch_size: 1024" in run
    assert load_mixture("equilibrium/pretrain").metadata.total_tokens == 24000 * 1024 * 4096
