"""A stop signal at any moment: before the first step it ends the run, later the run saves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.config.load import save_config
from tests.checkpoint.support import MODEL
from tests.support.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 300  # only a test that hangs waits so long
# Runs a function of the package with a pause before it: the process says where it is, and waits.
CHILD = """
import importlib, pathlib, sys, time
module, _, name = {where!r}.rpartition(".")
module = importlib.import_module(module)
sound = getattr(module, name)
def held(*arguments, **named):
    pathlib.Path({here!r}).touch()
    while {stuck!r} and not pathlib.Path({go!r}).exists():
        time.sleep(0.01)
    return sound(*arguments, **named)
setattr(module, name, held)
sys.argv = ["train", {config!r}]
from equilibrium_mcore.training.signals import take_signals_at_once
take_signals_at_once()
from equilibrium_mcore.train import main
sys.exit(main(sys.argv[1:]))
"""
PLACES = {  # where a run is held, and whether that is in its ranks
    "reading the config": "equilibrium_mcore.train.load_run_config",
    "before the ranks": "equilibrium_mcore.parallel.launch.launch",
    "joining": "equilibrium_mcore.parallel.process_groups.initialize_groups",
    "building the data": "equilibrium_mcore.training.setup.build_run_datasets",
    "building the model": "equilibrium_mcore.training.setup.build_chunks",
    "before the loop": "equilibrium_mcore.training.all_callbacks.build_callbacks",
}


class Held:
    """A run in a process of its own, held at a place."""

    def __init__(self, folder: Path, config, where: str) -> None:
        self.here, self.go = folder / "here", folder / "go"
        save_config(config, folder / "run.yaml")
        values = {"where": where, "here": str(self.here), "go": str(self.go), "stuck": True}
        code = CHILD.format(config=str(folder / "run.yaml"), **values)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_there(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.here.exists():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, output


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_before_the_first_step_it_ends_the_run(data, tmp_path, place, ranks):
    config = tiny_run(
        data,
        tmp_path / "run",
        model=MODEL,
        parallelism={"world_size": ranks},
        training={"steps": 2},
    )
    number = signal.SIGINT if place == "building the data" else signal.SIGTERM
    run = Held(tmp_path, config, PLACES[place])
    run.wait_there()
    run.process.send_signal(number)
    status, output = run.end()
    assert status in (-number, 128 + number), output
    assert "Traceback" not in output
    assert directory.latest_checkpoint(tmp_path / "run") is None


def test_within_the_loop_it_saves(data, tmp_path):
    config = tiny_run(
        data, tmp_path / "run", model=MODEL, parallelism={"world_size": 2}, training={"steps": 99}
    )
    run = Held(tmp_path, config, "equilibrium_mcore.training.loop.train_step")
    run.wait_there()
    run.process.send_signal(signal.SIGTERM)
    run.go.touch()
    status, output = run.end()
    assert status == 0 and "| signal" in output
    assert directory.latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_twice_ends_a_stuck_run(data, tmp_path, ranks):
    """Once it asks to save, which a run that is stuck never does."""
    config = tiny_run(
        data,
        tmp_path / "run",
        model=MODEL,
        parallelism={"world_size": ranks},
        training={"steps": 9},
    )
    run = Held(tmp_path, config, "equilibrium_mcore.training.loop.train_step")
    run.wait_there()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while run.process.poll() is None:  # presses of Ctrl-C, a second apart; two are enough
        assert time.monotonic() < deadline
        run.process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert run.end()[0] in (-signal.SIGINT, 128 + signal.SIGINT)


STUCK_IN_C = """
import ctypes, os, signal, threading, time
from equilibrium_mcore.training.signals import StopSignals
def press():
    for _ in range(2):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
with StopSignals():
    threading.Thread(target=press, daemon=True).start()
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # never returns, and no signal ends it
"""


def test_a_second_ctrl_c_needs_no_python_of_the_main_thread():
    command = [sys.executable, "-c", STUCK_IN_C]
    done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 128 + signal.SIGINT


def test_a_full_disk_under_stdout_does_not_end_training(data, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    config = tiny_run(data, tmp_path / "run", model=MODEL, training={"steps": 3})
    save_config(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "equilibrium_mcore.train", str(tmp_path / "run.yaml")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "stdout takes no more" in done.stderr
    assert directory.latest_checkpoint(tmp_path / "run").name == "step_00000003"
