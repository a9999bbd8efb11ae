"""Launcher variables that cannot be, and ranks that wait for others."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.parallel import rendezvous
from equilibrium_mcore.parallel.rank_job import RankInfo, rank_info_from_environment
from equilibrium_mcore.parallel.rendezvous import meeting, meeting_place

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.5", "1e0", "٣", "9" * 5000])
def test_a_variable_that_is_no_number(launcher, value):
    for name in launcher:
        with pytest.raises(ConfigError, match=rf"^1 problem:\n  1\. {name}="):
            rank_info_from_environment({**launcher, **PLACE, name: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks are 0 to 1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: a run has at least one rank"),
        ({"RANK": None}, "WORLD_SIZE='2' is set and RANK is not"),
        ({"WORLD_SIZE": None}, "RANK='1' is set and WORLD_SIZE is not"),
    ],
)
def test_variables_that_contradict_each_other(changes, says):
    environment = {key: v for key, v in {**TORCHRUN, **changes}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        rank_info_from_environment(environment)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": " "}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be from 1 to 65535"),
        ({"MASTER_ADDR": "no such host"}, "MASTER_ADDR='no such host': this host does not know"),
        ({"MASTER_ADDR": "x" * 300}, "this host does not know that address"),
    ],
)
def test_a_meeting_place_that_cannot_be(changes, says):
    with pytest.raises(ConfigError) as caught:
        meeting_place({**PLACE, **changes})
    assert says in str(caught.value)


def test_who_waits_says_for_whom(monkeypatch, capsys):
    """The port is taken and nobody listens there, so it does not answer."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setattr(os, "environ", {**os.environ, name: value})
        monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.0)
        said = threading.Event()
        monkeypatch.setattr(rendezvous, "print", lambda *a, **k: (print(*a), said.set()), False)
        rank = RankInfo(rank=1, world_size=2, local_rank=1, init_method="env://")
        with (
            pytest.raises(ConfigError, match="rank 1 of 2 did not meet the others"),
            meeting(rank, timeout_minutes=7),
        ):
            assert said.wait(300)
            raise RuntimeError("torch: the client socket has timed out\nC++ stack")
    told = capsys.readouterr().out
    assert f"rank 1 of 2: waiting for rank 0 at 127.0.0.1:{port}, which does not answer" in told
    assert "parallelism.timeout_minutes=7" in told


def test_a_rank_that_is_alone_meets_nobody(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with meeting(RankInfo.alone(), timeout_minutes=1):
        pass
