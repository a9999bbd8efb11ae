"""A checkpoint that is written beside training is the one that training would have waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from equilibrium_mcore.checkpoint import directory, writer_process
from equilibrium_mcore.checkpoint.background import Background
from equilibrium_mcore.checkpoint.data_files import DataFile, write_data_file
from equilibrium_mcore.checkpoint.manifest import HASH, read_manifest
from equilibrium_mcore.checkpoint.shared_buffer import SharedBuffer
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.rank_job import RankError, RankInfo
from tests.checkpoint.support import MODEL
from tests.support.runs import tiny_run, train_steps

PATIENCE_SECONDS = 300  # only a test that hangs waits so long


def _train(
    rank_info: RankInfo, config: RunConfig, *, steps: int, fault: str | None = None
) -> dict[str, Any]:
    """Train with the run's own callback; the first save's writer is stopped until the fault is."""
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    callback = CheckpointCallback(config, LogCallback(config))
    callback.on_start(run)
    writer = callback._ready_writer(config)
    losses, seen = [], []
    if fault is not None:
        os.kill(writer._process.pid, signal.SIGSTOP)
    for _ in range(steps):
        outcome = train_step(run)
        losses.append(outcome.loss)
        callback.on_step(run, outcome)
        seen.append(str(directory.latest_checkpoint(config.output_directory)))
    if fault == "slow":
        os.kill(writer._process.pid, signal.SIGCONT)
    elif fault == "killed" and rank_info.rank == 1:
        os.kill(writer._process.pid, signal.SIGKILL)
    elif fault == "no folder":
        for partial in Path(config.output_directory, "checkpoints").glob("*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
    elif fault == "trainer killed":
        Path(config.output_directory, f"writer_{rank_info.rank}").write_text(
            str(writer._process.pid)
        )
        os.kill(os.getpid(), signal.SIGKILL)
    if fault is not None:
        os.kill(writer._process.pid, signal.SIGCONT)
    callback.on_end(run, reason="stop")
    teardown(run)
    return {"losses": losses, "seen": seen}


def _config(data, folder: Path, *, asynchronous: bool = True, **changes: Any) -> RunConfig:
    checkpoint = {"asynchronous": asynchronous, "save_interval_steps": 2, "keep_last": 9}
    checkpoint |= changes.pop("checkpoint", {})
    layout = {"world_size": 2, **changes.pop("parallelism", {})}
    return tiny_run(data, folder, model=MODEL, parallelism=layout, checkpoint=checkpoint, **changes)


def _data_hashes(checkpoint: Path) -> dict[str, str]:
    """Of the files that hold tensors and their places; state.json has the time of saving."""
    files = read_manifest(checkpoint)
    return {name: facts[HASH] for name, facts in files.items() if name.endswith("distcp")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallelism": {"tensor": 2, "sequence": True}},
        {"optimizer": {"schedule_free": {}, "schedule": {"kind": "constant", "warmup_steps": 2}}},
    ],
    ids=["dp2", "tp2", "schedule_free"],
)
def test_the_same_bytes_as_without(ranks, data, tmp_path, changes):
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        config = _config(data, folder, asynchronous=asynchronous, **changes)
        ranks.run(2, _train_of(5), config)
    plain, beside = (directory.list_checkpoints(tmp_path / name) for name in ("False", "True"))
    assert [path.name for path in plain] == [path.name for path in beside]
    assert [directory.step_of(path) for path in beside] == [2, 4, 5]
    for one, other in zip(plain, beside, strict=True):
        assert _data_hashes(one) == _data_hashes(other) != {}
        assert directory.read_state(one)["step"] == directory.read_state(other)["step"]


def _save_by_megatron_too(rank_info: RankInfo, config: RunConfig) -> None:
    from megatron.core import dist_checkpointing

    from equilibrium_mcore.checkpoint.save import save_checkpoint
    from equilibrium_mcore.checkpoint.sharded import sharded_state
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    train_step(run)
    progress = run.progress_to_save()
    parts = {"chunks": run.chunks, "optimizer": run.optimizer}
    save_checkpoint(config=config, progress=progress, **parts)
    theirs = Path(config.output_directory, "theirs")
    theirs.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(**parts, progress=progress), str(theirs))
    teardown(run)


def test_the_bytes_are_those_of_megatrons_writer(ranks, data, tmp_path):
    """With an MLP, whose gate and up are saved as views of one tensor."""
    config = _config(data, tmp_path, asynchronous=False)
    ranks.run(2, _save_by_megatron_too, config)
    (ours,) = directory.list_checkpoints(tmp_path)
    names = sorted(path.name for path in ours.glob("*.distcp"))
    assert len(names) == 2
    for name in names:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def _train_of(steps: int, fault: str | None = None):
    from functools import partial

    return partial(_train, steps=steps, fault=fault)


def test_training_goes_on_and_the_copy_is_of_its_step(ranks, data, tmp_path):
    """The writer stands still until three more steps have changed every weight."""
    interval = {"checkpoint": {"save_interval_steps": 2}}
    slow = _config(data, tmp_path / "slow", **interval)
    outcome = ranks.run(2, _train_of(3, "slow"), slow)[0]
    assert outcome["seen"] == ["None"] * 3  # nothing has the name of a checkpoint meanwhile
    plain = _config(data, tmp_path / "plain", asynchronous=False, **interval)
    expected = ranks.run(2, _train_of(3), plain)[0]
    assert outcome["losses"] == expected["losses"]
    for step in (2, 3):
        name = f"checkpoints/step_{step:08d}"
        assert _data_hashes(tmp_path / "slow" / name) == _data_hashes(tmp_path / "plain" / name)
    resumed = ranks.run(2, train_steps, slow, 2)[0]
    assert resumed["start"] == 3
    assert resumed["loss"] == ranks.run(2, train_steps, plain, 2)[0]["loss"]


def test_a_writer_that_is_killed_is_told_on_every_rank(ranks, data, tmp_path):
    config = _config(data, tmp_path)
    ranks.run(2, _train_of(2), config)
    with pytest.raises(RankError, match=r"ended by signal 9: .*checkpoint\.asynchronous") as error:
        ranks.run(2, _train_of(2, "killed"), config)
    assert error.value.told and "Traceback" not in str(error.value)
    assert directory.latest_checkpoint(tmp_path).name == "step_00000002"
    assert ranks.run(2, train_steps, config, 1)[0]["start"] == 2


def test_what_the_writer_meets_is_raised_and_names_the_file(ranks, data, tmp_path):
    config = _config(data, tmp_path)
    with pytest.raises(RankError, match=r"step_00000002.*distcp: .*No such file"):
        ranks.run(2, _train_of(2, "no folder"), config)
    assert directory.latest_checkpoint(tmp_path) is None


def test_a_writer_that_ends_with_nothing_to_write_spoils_nothing(tmp_path):
    writer, old = Background(), tmp_path / "old"
    old.mkdir()
    writer._process.kill()
    writer._process.wait()
    writer.remove(old)
    assert not old.exists()
    writer.close()


@pytest.mark.parametrize("file", ["/dev/full", "/no/such/folder/file"])
def test_a_data_file_that_finds_no_room_is_named(file):
    """torch's writer would speak of positions in a zip file."""
    item = WriteItem(MetadataIndex("x"), WriteItemType.TENSOR)
    with pytest.raises(OSError) as caught:
        write_data_file(DataFile(Path(file), "x.distcp", [], [(item, torch.zeros(5000))]))
    assert caught.value.filename == file and caught.value.errno in (errno.ENOSPC, errno.ENOENT)


def test_a_writer_whose_rank_is_gone_ends_quietly(monkeypatch):
    """A rank that ends with an answer unread resets the pipe; one that has read it ends the pipe"""
    monkeypatch.setattr(writer_process, "end_with_parent", lambda parent: None)
    ours, theirs = Pipe()
    theirs.send("an answer that nobody reads")
    descriptor = os.dup(theirs.fileno())
    ours.close()
    theirs.close()
    assert writer_process.main(["0", str(descriptor), str(SharedBuffer().descriptor)]) == 0


def test_a_killed_run_loses_no_more_than_the_interval_and_leaves_no_writer(ranks, data, tmp_path):
    config = _config(data, tmp_path)
    ranks.run(2, _train_of(2), config)
    with pytest.raises(RankError):
        ranks.run(2, _train_of(2, "trainer killed"), config)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for path in tmp_path.glob("writer_*"):
        writer = int(path.read_text())
        while _is_alive(writer):
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer, signal.SIGCONT)  # it may have stood still before its first line
            assert time.monotonic() < deadline, "the writer outlives its rank"
            time.sleep(0.05)
    assert directory.latest_checkpoint(tmp_path).name == "step_00000002"
    assert ranks.run(2, _train_of(2), config)[0]["seen"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004"]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # a killed one that nobody has waited for is a zombie
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
