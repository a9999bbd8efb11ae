"""How the ranks of a launched run find each other: the address is known, and who waits says so.

torch.distributed meets at MASTER_ADDR:MASTER_PORT, where rank 0 listens. On a cluster rank 0 may
start minutes after the others, so a rank waits as long as `parallelism.timeout_minutes`; a name
that nobody knows is an error at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.parallel.rank_job import RankInfo, launcher_number

SAY_SECONDS = 10.0  # a rank that still waits for others after so long says for whom
PROBE_SECONDS = 3.0
PORTS = range(1, 65536)


def meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """The address and port of rank 0, by the launcher's variables.

    Raises ConfigError for a variable that is missing, a port that is none and an address that
    nobody knows.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name, "").strip():
            raise ConfigError(
                f"{name} is not set, so the ranks cannot find each other: it is the address (port) "
                "of rank 0; torchrun sets it, under srun export it as slurm/train.sh does"
            )
    address = environment["MASTER_ADDR"]
    port = launcher_number(environment, "MASTER_PORT")
    if port not in PORTS:
        raise ConfigError(f"MASTER_PORT={port}: must be from 1 to {PORTS[-1]}, e.g. 29500")
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"MASTER_ADDR={address!r}: this host does not know that address ({reason}): give the "
            "name or number of the host of rank 0"
        ) from None
    return address, port


@contextlib.contextmanager
def meeting(rank_info: RankInfo, *, timeout_minutes: int) -> Iterator[None]:
    """Inside, this rank meets the others: torch.distributed's errors become ConfigError in words.

    After SAY_SECONDS without success it says for whom it waits.
    """
    if rank_info.init_method != "env://":
        yield
        return
    address, port = meeting_place(os.environ)
    me = f"rank {rank_info.rank} of {rank_info.world_size}"
    until = f"until parallelism.timeout_minutes={timeout_minutes} are over"

    def say() -> None:
        whom = "the other ranks" if rank_info.rank == 0 else f"rank 0 at {address}:{port}"
        found = "" if rank_info.rank == 0 else f", {_probe(address, port)}"
        print(f"{me}: waiting for {whom}{found}; {until}", file=sys.stderr, flush=True)

    timer = threading.Timer(SAY_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError, DistNetworkError
        first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{me} did not meet the others at MASTER_ADDR={address} MASTER_PORT={port}: {first}. "
            "Is every rank started, with the same address and port, and is the port free on the "
            "host of rank 0 and open to the others? parallelism.timeout_minutes="
            f"{timeout_minutes} is how long they wait"
        ) from error
    finally:
        timer.cancel()


def _probe(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), timeout=PROBE_SECONDS):
            return "which answers, and waits for others too"
    except OSError as error:
        return f"which does not answer ({error.strerror or error})"
