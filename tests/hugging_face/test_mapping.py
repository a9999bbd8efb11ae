"""The mapping table: complete, loud about what does not fit, and invertible."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.hugging_face.config_json import config_values
from equilibrium_mcore.hugging_face.mapping import (
    LAYER_MAPPING,
    MODEL_MAPPING,
    ParamMapping,
    expand,
    plan,
)
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from equilibrium_mcore.hugging_face.weights import expected_shapes
from tests.hugging_face.conftest import MODELS


@pytest.fixture
def names(saved):
    return CheckpointReader(saved("hybrid").directory).names()


def test_unmapped_missing_and_doubled_tensors_are_named(names):
    model = MODELS["hybrid"]
    plan(model, names)
    with pytest.raises(ValueError, match="unmapped: decoder.layers.0.mixer.surprise"):
        plan(model, [*names, "decoder.layers.0.mixer.surprise"])
    without = [name for name in names if name != "decoder.layers.0.mixer.in_proj.weight.dt"]
    with pytest.raises(ValueError, match="missing: decoder.layers.0.mixer.in_proj.weight.dt"):
        plan(model, without)
    again = ParamMapping("mixer.A_log", "mixer.another")
    doubled = {**LAYER_MAPPING, "mamba": (*LAYER_MAPPING["mamba"], again)}
    with pytest.raises(ValueError, match="mapped twice: decoder.layers.0.mixer.A_log"):
        plan(model, names, of_layers=doubled)
    same_target = (ParamMapping("decoder.extra", "model.norm.weight"), *MODEL_MAPPING)
    with pytest.raises(ValueError, match="mapped twice: model.norm.weight"):
        plan(model, [*names, "decoder.extra"], of_model=same_target)


def test_a_config_of_another_model_is_refused(names):
    tied = MODELS["hybrid"].model_copy(update={"tie_embeddings": True})
    with pytest.raises(ValueError, match="unmapped: output_layer.weight"):
        plan(tied, names)


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_bytes(name, saved):
    model = MODELS[name]
    reader = CheckpointReader(saved(name).directory)
    for row in plan(model, reader.names()):
        before = [reader.read(key) for key in row.megatron]
        there = row.transform.to_hugging_face(before, model)
        back = row.transform.to_megatron(there, model)
        assert len(there) == len(row.hugging_face)
        for left, right in zip(before, back, strict=True):
            assert left.shape == right.shape
            rows = model.vocab_size if "word_emb" in str(row) or "output_l" in str(row) else None
            assert torch.equal(left[:rows], right[:rows])


@pytest.mark.parametrize(
    "name",
    [
        "equilibrium_3b",
        "equilibrium_tiny",
        "llama_1b",
        "qwen2_7b",
        "deepseek_v2_lite_16b",
        "mamba2_1.3b",
    ],
)
def test_every_shipped_model_has_a_hugging_face_model(name):
    """The names that the table makes are the names that the model loads."""
    model = load_model(name)
    shapes = expected_shapes(config_values(model, sequence_length=4096))
    made = [target for row in expand(model) for target in row.hugging_face]
    assert sorted(made) == sorted(shapes)
