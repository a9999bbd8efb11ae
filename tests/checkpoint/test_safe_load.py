"""Crafted checkpoints: nothing in them is executed, wherever they are read."""

from __future__ import annotations

import io
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from equilibrium_mcore.checkpoint.choose import choose
from equilibrium_mcore.checkpoint.manifest import DamagedCheckpointError
from equilibrium_mcore.checkpoint.opened import open_checkpoint, open_weights
from equilibrium_mcore.checkpoint.safe_load import (
    SafePlanner,
    SafeReader,
    allowed_classes_only,
    read_metadata,
)
from equilibrium_mcore.checkpoint.structure import PROGRESS_KEY
from equilibrium_mcore.hugging_face.convert import export_hugging_face
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from tests.checkpoint.support import Evil, make_old, plant_in_metadata, plant_object
from tests.support.pool import RankError
from tests.support.runs import train_steps

RANDOM_KEY = "random_states/shard_0_2"
NAMED = rf"names {os.mkdir.__module__}.mkdir, which is no class"


@pytest.fixture
def newest(copied) -> Path:
    return copied / "checkpoints" / "step_00000003"


@pytest.fixture
def proof(tmp_path) -> Path:
    """What a crafted checkpoint makes if it is executed."""
    return tmp_path / "executed"


def test_the_crafted_ones_would_run(newest, proof):
    """What the other tests keep from happening."""
    plant_in_metadata(newest, Evil(proof))
    pickle.loads((newest / ".metadata").read_bytes())
    assert proof.is_dir()


READERS: dict[str, Any] = {
    "inspection": lambda folder: open_checkpoint(folder, needs_state=True),
    "export": CheckpointReader,
    "the metadata alone": read_metadata,
    "torch's reader": lambda folder: SafeReader(folder).read_metadata(),
}


@pytest.mark.parametrize("name", READERS)
def test_metadata_is_not_executed(newest, proof, name):
    plant_in_metadata(newest, Evil(proof))
    with pytest.raises(DamagedCheckpointError, match=rf"\.metadata: its pickle {NAMED}"):
        READERS[name](newest)
    assert not proof.exists()


def test_megatrons_readers_do_not_execute_metadata(newest, proof):
    from megatron.core import dist_checkpointing

    plant_in_metadata(newest, Evil(proof))
    with pytest.raises(DamagedCheckpointError, match=NAMED), allowed_classes_only():
        dist_checkpointing.load_tensors_metadata(str(newest))
    assert not proof.exists()


@pytest.mark.parametrize("key", [RANDOM_KEY, PROGRESS_KEY])
def test_objects_are_not_executed(newest, proof, key):
    file = plant_object(newest, key, [Evil(proof)])
    refused = f"{file}: its pickle {NAMED}"
    for flat in (True, False):  # the two branches of the planner
        planner = DefaultLoadPlanner(flatten_state_dict=flat)
        with pytest.raises(DamagedCheckpointError, match=refused), allowed_classes_only():
            reader = dcp.FileSystemReader(newest)
            dcp.load({key: io.BytesIO()}, storage_reader=reader, planner=planner, no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match=NAMED):
        dcp.load(
            {key: io.BytesIO()},
            storage_reader=SafeReader(newest),
            planner=SafePlanner(),
            no_dist=True,
        )
    assert not proof.exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_run_does_not_execute_its_progress(one_rank, newest, proof, config, old):
    file = plant_object(newest, PROGRESS_KEY, [Evil(proof)])
    if old:
        make_old(newest)
    choice = choose(config())
    assert choice.progress["step"] == 2
    assert f"{file}: its pickle names" in str(choice.notes)
    assert not proof.exists()


def test_a_resume_does_not_execute_random_states(ranks, newest, proof, config):
    file = plant_object(newest, RANDOM_KEY, [Evil(proof)])
    with pytest.raises(RankError, match=f"{file}: its pickle {NAMED}"):
        ranks.run(2, train_steps, config(), 1)
    assert not proof.exists()


def test_weights_and_the_export_do_not_execute(newest, proof, tmp_path):
    plant_in_metadata(newest, Evil(proof))
    with pytest.raises(DamagedCheckpointError, match=NAMED):
        open_weights(newest.parent.parent)
    with pytest.raises(DamagedCheckpointError, match=NAMED):
        export_hugging_face(newest, tmp_path / "exported")
    assert not proof.exists() and not (tmp_path / "exported").exists()


def test_another_format_of_megatrons_is_refused(newest):
    torch.save({}, newest / "common.pt")
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt"):
        open_checkpoint(newest)


def test_a_huge_index_takes_no_memory(newest):
    """The C unpickler would make a table of 32 GiB for this memo."""
    (newest / ".metadata").write_bytes(pickle.PROTO + b"\x04N" + b"r\xff\xff\xff\xff" + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedCheckpointError, match="holds a NoneType"):
        read_metadata(newest)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_files_elsewhere_are_not_read(newest):
    metadata = Metadata({}, storage_data={MetadataIndex("x"): _info("../latest")})
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match="outside of the checkpoint"):
        read_metadata(newest)


def _info(path: str) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(path, 0, 1)


def test_torch_is_as_before_afterwards(newest):
    seams = [
        (dcp.FileSystemReader, "read_metadata"),
        (dcp.FileSystemReader, "read_data"),
        (DefaultLoadPlanner, "load_bytes"),
    ]
    before = [owner.__dict__[name] for owner, name in seams]
    with pytest.raises(KeyError), allowed_classes_only():
        assert [owner.__dict__[name] for owner, name in seams] != before
        raise KeyError
    assert [owner.__dict__[name] for owner, name in seams] == before
