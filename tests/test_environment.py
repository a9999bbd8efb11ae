"""Tests and tools run in a user's environment: they set nothing that a user does not set."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HIDING = re.compile(
    r"\b(\w+_NUM_THREADS|MKL_DYNAMIC|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|"
    r"MPLBACKEND|set_num_threads|set_num_interop_threads)\b"
)
# Where such a name may stand, and why.
ALLOWED = {
    "tests/test_environment.py": "it names what it looks for",
    "tests/corpus/mixtures/test_hub.py": "what is said to users who set it is tested",
    "tests/parallel/test_rank_server.py": "ranks with several threads are what is tested",
    "tests/processes/test_processes.py": "that it is heeded is tested",
    "tools/bench/certificates.py": "the number of threads is what the campaign varies",
    "tools/bench/rollouts.py": "on request: threads that wait for another take CPU time, too",
    "tests/slurm/local_cluster.sh": "it is taken away",
}


def test_nothing_is_set_that_users_do_not_set():
    files = [path for room in ("tests", "tools", ".ci") for path in (ROOT / room).rglob("*")]
    found = {
        str(path.relative_to(ROOT)): HIDING.findall(path.read_text(encoding="utf-8"))
        for path in files
        if path.is_file() and (path.suffix in (".py", ".sh", ".yml") or path.parent.name == ".ci")
    }
    assert len(found) > 50
    setting = {name: names for name, names in found.items() if names}
    assert set(setting) <= set(ALLOWED), setting
    assert set(ALLOWED) <= set(setting), "an exception that nothing needs any more"
