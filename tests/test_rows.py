"""A layer kind, an optimizer and a parallelism are rows: no table of them forgets one."""

from __future__ import annotations

import dataclasses
import inspect
import random
import re
from collections.abc import Collection
from typing import Any, get_args

import pytest

from equilibrium_mcore.config.layout import DIMENSIONS, megatron_sizes
from equilibrium_mcore.config.optimizers import OPTIMIZERS, REST, OptimizerConfig, OptimizerName
from equilibrium_mcore.config.pattern import LAYER_KINDS
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig
from equilibrium_mcore.parallel import accelerator
from tests.certify.settings import CASES
from tests.support.tables import ROOT, tables_keyed

accelerator.install()  # before megatron-core is imported
accelerator.quiet_libraries()

KINDS = tuple(LAYER_KINDS.values())
# Every concern that tells kinds of layers apart, and its table. A further one is found by itself.
OF_KINDS = {
    "config: its name": "equilibrium_mcore/config/pattern.py: LABELS",
    "config: whether it mixes positions": "equilibrium_mcore/config/pattern.py: MIXES_POSITIONS",
    "rules: heads": "equilibrium_mcore/config/model_rules.py: HEAD_GROUPS",
    "rules: RoPE": "equilibrium_mcore/config/model_rules.py: ROPE_WIDTHS",
    "rules: TP": "equilibrium_mcore/config/layer_splits.py: TENSOR_SPLITS",
    "rules: CP": "equilibrium_mcore/config/layer_splits.py: CONTEXT_PROBLEMS",
    "rules: FP8": "equilibrium_mcore/config/layer_splits.py: FP8_WIDTHS",
    "rules: recomputation": "equilibrium_mcore/config/training_rules.py: RECOMPUTED",
    "megatron-core's config": "equilibrium_mcore/models/transformer_config.py: LAYER_VALUES",
    "specs": "equilibrium_mcore/models/specs.py: LAYER_SPECS",
    "precision": "equilibrium_mcore/models/provider.py: KEPT_IN_FLOAT32",
    "counts": "equilibrium_mcore/models/parameters.py: COUNTED_APART",
    "FLOPs": "equilibrium_mcore/models/flops.py: LAYER_FLOPS",
    "FLOPs: kinds of work": "equilibrium_mcore/models/flops.py: WORK",
    "optimizer": "equilibrium_mcore/optim/table.py: LAYER_RULES",
    "mapping": "equilibrium_mcore/hugging_face/mapping.py: LAYER_MAPPING",
    "config.json": "equilibrium_mcore/hugging_face/config_json.py: SECTIONS",
    "card": "equilibrium_mcore/hugging_face/model_card.py: KIND_NAMES",
    "card: shapes": "equilibrium_mcore/hugging_face/model_card.py: SHAPES",
    "twin": "equilibrium_mcore/certify/shrink.py: TWINS",
    "twin: its optimizer": "equilibrium_mcore/certify/shrink_optimizer.py: LONGEST_SIDES",
    "kernels": "equilibrium_mcore/certify/kernels.py: KERNELS",
    "random runs: patterns": "tools/bench/random_runs/draw.py: COPIES",
    "random runs: overrides": "tools/bench/random_runs/draw.py: OVERRIDDEN",
    "benchmark: memory": "tools/bench/measure/gpu.py: ACTIVATIONS",
}
OF_OPTIMIZERS = {
    "config": "equilibrium_mcore/config/optimizers.py: OPTIMIZERS",
    "how it is built": "equilibrium_mcore/optim/build.py: BUILDS",
    "twin": "equilibrium_mcore/certify/shrink_optimizer.py: TWIN_OPTIMIZERS",
    "certificate's tolerance": "equilibrium_mcore/certify/compare.py: UPDATE",
    "sanity": "equilibrium_mcore/sanity/learning_checks.py: OVERFIT",
}


def differences(what: str, found: Collection[str], wanted: Collection[str]) -> list[str]:
    """In words: rows that the table `what` lacks, and rows that it should not have."""
    lacking = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    return [
        *(f"{what} has no row for {name!r}" for name in lacking),
        *(f"{what} has a row for {name!r}, which there is not" for name in unknown),
    ]


def problems(tables: dict[str, dict[str, Any]], wanted: Collection[str]) -> list[str]:
    """The differences of all tables."""
    return [text for where, table in tables.items() for text in differences(where, table, wanted)]


# ---------------------------------------------------------------------------------- layer kinds


def test_every_table_has_every_layer_kind():
    assert not (found := problems(tables_keyed("ByKind"), KINDS)), "\n".join(found)


def test_a_forgotten_kind_is_named_with_its_table_and_file():
    tables = tables_keyed("ByKind")
    for where, table in tables.items():
        for kind in KINDS:
            without = {key: row for key, row in table.items() if key != kind}
            assert f"{where} has no row for {kind!r}" in problems({where: without}, KINDS)


def test_no_table_of_layer_kinds_is_gone():
    missing = set(OF_KINDS.values()) - tables_keyed("ByKind").keys()
    assert not missing, f"not annotated ByKind, or not there: {sorted(missing)}"


def test_every_layer_kind_has_its_section():
    needed = {
        name: field.description
        for name, field in ModelConfig.model_fields.items()
        if field.default is None
    }
    assert needed == {kind: f"needed by {letter}" for letter, kind in LAYER_KINDS.items()}


def test_megatron_core_knows_every_letter_and_has_a_place_for_its_layer():
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    assert LAYER_KINDS.keys() <= Symbols.VALID_LAYERS
    places = {field.name for field in dataclasses.fields(HybridStackSubmodules)}
    assert {f"{kind}_layer" for kind in KINDS} <= places


def test_the_exported_code_has_every_letter():
    from equilibrium_mcore.hugging_face.model_code import (
        configuration_equilibrium,
        modeling_equilibrium,
    )

    for module, name in (
        (configuration_equilibrium, "LAYER_TYPES"),
        (modeling_equilibrium, "MIXERS"),
    ):
        found = differences(f"{module.__name__}: {name}", getattr(module, name), LAYER_KINDS)
        assert not found, "\n".join(found)


# ----------------------------------------------------------------------------------- optimizers


def test_every_table_has_every_optimizer():
    assert not (found := problems(tables_keyed("ByOptimizer"), OPTIMIZERS)), "\n".join(found)


def test_no_table_of_optimizers_is_gone():
    missing = set(OF_OPTIMIZERS.values()) - tables_keyed("ByOptimizer").keys()
    assert not missing, f"not annotated ByOptimizer, or not there: {sorted(missing)}"


def test_every_optimizer_can_be_chosen_and_has_its_section():
    what = "equilibrium_mcore/config/optimizers.py: OptimizerName"
    assert not (found := differences(what, get_args(OptimizerName), OPTIMIZERS)), found
    assert not OPTIMIZERS[REST].takes_matrices
    for name, row in OPTIMIZERS.items():
        assert OptimizerConfig.model_fields[name].annotation is row.section
        wanted = {"learning_rate", "weight_decay", *row.decays, *row.state_settings}
        assert wanted <= row.section.model_fields.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_certified_compared_and_drawn(name):
    from examples.optimizer_shootout.variants import VARIANTS
    from tools.bench.random_runs.draw import OVERRIDES
    from tools.bench.random_runs.settings import DRAWN

    assert name in {case.partition("_")[0] for case in CASES}, "tests/certify/settings.py: CASES"
    assert name in VARIANTS, "examples/optimizer_shootout/variants.py: VARIANTS"
    assert name in DRAWN["optimizer.matrices"]
    drawn = {override.get("optimizer") for override in OVERRIDES}
    assert name in drawn, "tools/bench/random_runs/draw.py: OVERRIDES"


# -------------------------------------------------------------------------------- parallelisms


def test_every_dimension_is_a_setting_and_an_argument_of_megatron_core():
    from megatron.core.transformer import TransformerConfig

    from equilibrium_mcore.parallel.process_groups import parallel_state

    fields = ParallelismConfig.model_fields.items()
    sizes = {name for name, field in fields if field.annotation is int and field.default == 1}
    assert not (found := differences("config/layout.py: DIMENSIONS", DIMENSIONS, sizes)), found
    of_groups = inspect.signature(parallel_state.initialize_model_parallel).parameters
    of_config = {field.name for field in dataclasses.fields(TransformerConfig)}
    names = megatron_sizes(ParallelismConfig()).keys()
    unknown = [name for name in names if name not in of_groups or name not in of_config]
    assert not unknown, f"megatron-core's groups and TransformerConfig do not both take {unknown}"
    assert len(names) == len({row.short for row in DIMENSIONS.values()}) == len(DIMENSIONS)


def test_sizes_have_megatron_cores_names_in_one_place():
    names = re.compile("|".join(megatron_sizes(ParallelismConfig())))
    paths = sorted((ROOT / "equilibrium_mcore").rglob("*.py"))
    found = [str(p.relative_to(ROOT)) for p in paths if names.search(p.read_text("utf-8"))]
    assert found == ["equilibrium_mcore/config/layout.py"]


def test_every_dimension_is_drawn():
    from tools.bench.random_runs.layouts import random_layout

    drawn = {name for seed in range(200) for name in random_layout(random.Random(seed))}
    assert {row.short for row in DIMENSIONS.values()} <= drawn
