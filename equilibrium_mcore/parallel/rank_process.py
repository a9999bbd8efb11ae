"""What one rank does: its signals, its threads, its work, and what is left of it in files."""

from __future__ import annotations

import pickle
import signal
import sys
import time
import traceback

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.errors import told_in_words
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.parallel.rank_job import REFUSED, TOLD, Job
from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.processes.stacks import print_stacks_on_signal

# Ignored by the host: they come from the asker alone. A rank takes them as any process does.
ASKERS_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def play(job: Job, rank: int, *, host: int) -> int:
    """Do the work of a rank that was just forked from process `host`; its exit status.

    Leaves `result`, or `traceback` with its time in the first line, in the job's folder.
    """
    end_with_parent(host)
    signal.set_wakeup_fd(-1)
    for number in (*ASKERS_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # Not whole: as `result` and `traceback` it is read once this process has ended, and removed.
    stacks = job.file(rank, "stack").open("w", encoding="utf-8")
    print_stacks_on_signal(stacks)
    try:
        result = _work(job, rank)
        with open_named(job.file(rank, "result"), "wb") as stream:  # not whole: see above
            stream.write(result)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        text, code = story_of(error)
        try:
            # Not whole: see above.
            job.file(rank, "traceback").write_text(f"{time.time()}\n{text}", encoding="utf-8")
        except OSError:  # no room for temporary files either
            print(f"rank {rank} failed:\n{text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def story_of(error: BaseException) -> tuple[str, int]:
    """What is told of an error, and the rank's exit status.

    A setting that cannot be, and what `told_in_words` knows, are told in words; anything else is a
    fault of ours, and has its traceback.
    """
    if isinstance(error, ConfigError):
        return str(error), REFUSED
    if (text := told_in_words(error)) is not None:
        return text, TOLD
    return traceback.format_exc(), 1


def _work(job: Job, rank: int) -> bytes:
    import torch

    torch.set_num_threads(job.threads)
    work, arguments = pickle.loads(job.work)
    # Plain pickling copies tensors; sharing their memory would end with this process.
    return pickle.dumps(work(job.rank_info(rank), *arguments))
