"""The accidents, one function each: `SCENARIOS` is the list that later work extends.

A scenario gets the bench, a random generator and a name of its own; it raises BrokenPromiseError
when a promise does not hold. Everything that it draws comes from the generator.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from equilibrium_mcore.checkpoint.directory import (
    checkpoints_directory,
    list_checkpoints,
    read_state,
)
from tests.faults.bench import BATCH, STEPS, Bench, Job, expect, logged_steps, wait_until
from tests.faults.damage import DAMAGES, Damage

Scenario = Callable[[Bench, random.Random, str], str]
# The training command, with a step that spikes wherever it is met.
SPIKES = """
import sys
from equilibrium_mcore.parallel import accelerator
accelerator.quiet_libraries()
accelerator.install()
from equilibrium_mcore.train import main
from tools.bench.measure.rollback import damaged_at
with damaged_at({position}):
    sys.exit(main(sys.argv[1:]))
"""


def parent_killed(bench: Bench, rng: random.Random, name: str) -> str:
    """SIGKILL to the command, again and again; the same command at once, without a pause."""
    run, moments, pids = bench.new_run(name), [], set()
    for _ in range(rng.randint(1, 3)):
        job = bench.start(run)
        moments.append(_wait_for_a_moment(run, job, rng))
        pids |= {process.pid for process in job.family()}
        job.process.kill()
        job.process.wait()
    bench.finish(run)
    bench.check_left(pids)
    return f"killed {', '.join(moments)}"


def rank_killed(bench: Bench, rng: random.Random, name: str) -> str:
    """SIGKILL to one rank, or to the helper that forks them: the run fails, says which, resumes."""
    run = bench.new_run(name)
    job = bench.start(run)
    moment = _wait_for_a_moment(run, job, rng)
    family = job.family()
    pids = {process.pid for process in family}
    ranks = [process for process in family[1:] if process.is_running()]
    if ranks:
        victim = rng.choice(ranks)
        told = "SIGKILL"
        with contextlib.suppress(psutil.NoSuchProcess):
            if victim.ppid() == job.process.pid:
                told = "the process that starts the ranks was ended from outside"
            victim.kill()
        if job.wait() == 0:  # it was through already
            expect(logged_steps(run) == STEPS, "a run that lost a rank fails", job.text())
        else:
            expect(told in job.text(), "what ended the rank is told", job.text())
    else:
        job.wait()
    bench.finish(run)
    bench.check_left(pids)
    return f"killed {moment}"


def stopped_by_signal(bench: Bench, rng: random.Random, name: str) -> str:
    """SIGTERM: the step that runs is finished and saved, and the command ends with 0."""
    run = bench.new_run(name)
    job = bench.start(run)
    wait_until(lambda: logged_steps(run) > 0 or job.process.poll() is not None, "a step is logged")
    pids = {process.pid for process in job.family()}
    job.process.send_signal(rng.choice((signal.SIGTERM, signal.SIGUSR1)))
    expect(job.wait() == 0, "a run that is asked to stop ends with 0", job.text())
    stopped = logged_steps(run)
    last = list_checkpoints(run)[-1].name
    expect(last == f"step_{stopped:08d}", "the step that ran was saved", (stopped, last))
    bench.finish(run)
    bench.check_left(pids)
    return f"stopped after step {stopped}"


def two_runs(bench: Bench, rng: random.Random, name: str) -> str:
    """Two runs in one output directory: one is refused and told by whom, the other is unharmed."""
    run = bench.new_run(name)
    jobs = [bench.start(run)]
    if rng.random() < 0.5:
        _wait_for_a_moment(run, jobs[0], rng, late=False)
    jobs.append(bench.start(run))
    wait_until(lambda: logged_steps(run) or _ended(jobs), "one of two runs trains")
    families = [{process.pid for process in job.family()} for job in jobs]
    pids = set.union(*families)
    statuses = [job.wait() for job in jobs]
    texts = "\n".join(job.text() for job in jobs)
    if statuses != [0, 0]:  # both may succeed, one after the other
        expect(sorted(statuses) == [0, 2], "one runs and one is refused", f"{statuses}\n{texts}")
        refused = jobs[statuses.index(2)].text()
        holders = families[statuses.index(0)]
        expect(
            any(f"process {pid} " in refused for pid in holders), "the refusal names it", refused
        )
    bench.check_curve(run)
    bench.check_left(pids)
    return f"statuses {statuses}"


def newest_damaged(bench: Bench, rng: random.Random, name: str) -> str:
    """The newest checkpoint is damaged: it is named, and an older one is resumed from."""
    run, damage, file = _damaged_half(bench, rng, name, DAMAGES)
    job = bench.finish(run)
    expect(file in job.text(), f"{damage.name} is told, with the file {file}", job.text())
    return f"{damage.name}, {file}"


def newest_damaged_and_wanted(bench: Bench, rng: random.Random, name: str) -> str:
    """With `resume: must` and a step, a damaged checkpoint is refused and nothing is lost."""
    harmful = [damage for damage in DAMAGES if damage.harmful]
    run, damage, file = _damaged_half(bench, rng, name, harmful)
    before = [path.name for path in list_checkpoints(run)]
    step = int(before[-1].removeprefix("step_"))
    job = bench.start(run, "checkpoint.resume=must", f"checkpoint.resume_step={step}")
    expect(job.wait() == 2, f"{damage.name} ({file}) is refused", job.text())
    expect("Traceback" not in job.text(), "the refusal is no traceback", job.text())
    expect(file in job.text(), f"the refusal names {file}", job.text())
    after = [path.name for path in list_checkpoints(run)]
    expect(before == after, "nothing is lost", (before, after))
    bench.finish(run)
    return f"{damage.name}, {file}"


def killed_saving_beside_training(bench: Bench, rng: random.Random, name: str) -> str:
    """SIGKILL within an asynchronous save, to the command, a rank or a process that writes."""
    run, beside = bench.new_run(name), "checkpoint.asynchronous=true"
    job = bench.start(run, beside)
    saves = rng.randint(0, 2)
    wait_until(
        lambda: len(list_checkpoints(run)) >= saves and _saves(run) or _ended([job]),
        "the run saves",
    )
    family = job.family()
    pids = {process.pid for process in family}
    kind = rng.choice(("command", "rank", "writer"))
    killed = _kill_one(family, kind, rng)
    status = job.wait()
    if killed and status != 0 and kind == "writer":  # 0: it was through already
        expect("ended by signal 9" in job.text(), "what ended the writer is told", job.text())
    bench.finish(run, beside)
    bench.check_left(pids)
    return f"{kind if killed else 'nobody'} killed after {saves} saves or more, status {status}"


def stopped_while_starting(bench: Bench, rng: random.Random, name: str) -> str:
    """A stop signal at any moment of the start: the run ends by it, or has saved."""
    run = bench.new_run(name)
    fresh = rng.random() < 0.3
    job = bench.start(run, fresh=fresh)
    seconds = bench.start_seconds + bench.import_seconds * fresh
    seconds *= rng.uniform(0, 1.2)  # sometimes in the first steps
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.process.wait(seconds)
    pids = {process.pid for process in job.family()}
    number = rng.choice((signal.SIGTERM, signal.SIGUSR1))
    job.process.send_signal(number)
    status = job.wait()
    expect(status in (0, -number, 128 + number), "the status is the signal's", job.text())
    expect("Traceback" not in job.text(), "a stop is no failure", job.text())
    if status == 0:
        steps = [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]
        expect(logged_steps(run) in steps, "the step that ran was saved", (steps, job.text()))
    bench.finish(run)
    bench.check_left(pids)
    return f"{number.name} after {seconds:.1f} s, status {status}"


def spike_killed_and_resumed(bench: Bench, rng: random.Random, name: str) -> str:
    """A spike takes the run back; a kill follows, and the same command, where it spikes again."""
    run, position = bench.new_run(name), BATCH * (rng.randint(6, STEPS - 2) - 1)
    expected = bench.curve_without(position, BATCH)
    anomalies = "{policy: rollback, window_steps: 4}"
    words = (
        f"training.anomalies={anomalies}",
        f"checkpoint.asynchronous={rng.choice(('true', 'false'))}",
    )
    program = ("-c", SPIKES.format(position=position))
    job = bench.start(run, *words, program=program)
    wait_until(lambda: "| rollback:" in job.text() or _ended([job]), "the run goes back")
    moment = _wait_for_a_moment(run, job, rng)
    pids = {process.pid for process in job.family()}
    job.process.kill()
    job.process.wait()
    expect("| rollback:" in job.text(), "the run goes back", job.text())
    bench.finish(run, *words, program=program, expected=expected)
    left_out = read_state(list_checkpoints(run)[-1])["left_out"]
    expect(left_out == [[position, BATCH]], "the samples of the spike are left out", left_out)
    bench.check_left(pids)
    return f"spike at position {position}, killed {moment}"


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        parent_killed,
        rank_killed,
        stopped_by_signal,
        two_runs,
        newest_damaged,
        newest_damaged_and_wanted,
        killed_saving_beside_training,
        stopped_while_starting,
        spike_killed_and_resumed,
    )
}


# --------------------------------------------------------------------------------- the inside


def _ended(jobs: Sequence[Job]) -> bool:
    return all(job.process.poll() is not None for job in jobs)


def _saves(run: Path) -> bool:
    partial = checkpoints_directory(run)
    return partial.is_dir() and any(p.name.endswith(".partial") for p in partial.iterdir())


def _kill_one(family: Sequence[psutil.Process], kind: str, rng: random.Random) -> bool:
    """SIGKILL to the command, a rank or a process that writes; False where there is none."""
    writers, ranks = [], []
    for process in family[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("writer_process" in word for word in process.cmdline()):
                writers.append(process)
            elif process.ppid() != family[0].pid:  # not the helper, which forks the ranks
                ranks.append(process)
    victims = {"command": family[:1], "rank": ranks, "writer": writers}[kind]
    if not victims:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        rng.choice(victims).kill()
    return True


def _wait_for_a_moment(run: Path, job: Job, rng: random.Random, *, late: bool = True) -> str:
    """Wait for a moment that is drawn: early, at a step, or in the middle of a save."""
    step = rng.randint(0, STEPS if late else 3)
    if late and rng.random() < 0.4:
        wait_until(lambda: _saves(run) or job.process.poll() is not None, "the run saves")
        return "while saving"
    wait_until(
        lambda: logged_steps(run) >= step or job.process.poll() is not None, f"step {step} comes"
    )
    return f"at step {step}"


def _damaged_half(
    bench: Bench, rng: random.Random, name: str, damages: Sequence[Damage]
) -> tuple[Path, Damage, str]:
    """A run that stopped after nine steps, what was done to its newest checkpoint, to which file"""
    run = bench.new_run(name)
    job = bench.start(run, "training.stop_after_steps=9")
    expect(job.wait() == 0, "a run that stops early ends with 0", job.text())
    damage = rng.choice(damages)
    return run, damage, damage.do(list_checkpoints(run)[-1], rng)
