"""A damaged checkpoint is named, and the run continues from the newest that verifies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from equilibrium_mcore.checkpoint.choose import choose
from equilibrium_mcore.checkpoint.manifest import DamagedCheckpointError
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.checkpoint.support import change_state, flip, make_old, reseal, truncate

NEWEST = "step_00000003"


def _swap(path: Path) -> None:
    other = path.with_name(path.name.replace("__1", "__0"))
    held = path.read_bytes()
    shutil.copyfile(other, path)
    other.write_bytes(held)


DAMAGES = {
    "flipped data": ("__1_0.distcp", flip, "expected sha256"),
    "truncated data": ("__0_0.distcp", truncate, "bytes, found"),
    "missing data": ("__0_0.distcp", Path.unlink, "is missing; expected"),
    "swapped data": ("__1_0.distcp", _swap, "bytes, found"),
    "flipped metadata": (".metadata", flip, "expected sha256"),
    "truncated metadata": (".metadata", truncate, "bytes, found"),
    "missing metadata": (".metadata", Path.unlink, "is missing"),
    "flipped state": ("state.json", flip, "expected sha256"),
    "missing state": ("state.json", Path.unlink, "is missing"),
    "flipped config": ("config.yaml", flip, "expected sha256"),
    "missing config": ("config.yaml", Path.unlink, "is missing"),
    "flipped format": ("metadata.json", flip, "expected sha256"),
    "missing format": ("metadata.json", Path.unlink, "is missing"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "is no manifest"),
    "missing manifest": ("manifest.json", Path.unlink, "is missing"),
}


def told(choice, event: str) -> str:
    return "\n".join(str(details) for name, details in choice.notes if name == event)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_damage_is_named_and_the_one_before_is_taken(one_rank, copied, config, name):
    file, damage, words = DAMAGES[name]
    damage(copied / "checkpoints" / NEWEST / file)
    choice = choose(config())
    assert choice.checkpoint.path.name == "step_00000002"
    assert choice.progress["step"] == 2
    text = told(choice, "damaged")
    assert NEWEST in text and file in text and words in text


@pytest.mark.parametrize("name", [n for n in DAMAGES if "manifest" not in n and "swap" not in n])
def test_damage_of_an_old_checkpoint_is_named_as_far_as_it_shows(one_rank, copied, config, name):
    """Without hashes a flipped bit may pass; whatever does not is no traceback of a library."""
    file, damage, _ = DAMAGES[name]
    for path in (copied / "checkpoints").glob("step_*"):
        make_old(path)
    damage(copied / "checkpoints" / NEWEST / file)
    choice = choose(config())
    if "flipped" not in name:
        assert file in told(choice, "damaged") and choice.progress["step"] == 2
    else:
        assert choice.checkpoint.path.name in ("step_00000002", NEWEST)


def test_a_whole_one_is_taken_and_its_time_is_told(one_rank, copied, config):
    choice = choose(config())
    assert choice.checkpoint.path.name == NEWEST and not told(choice, "damaged")
    assert "seconds" in told(choice, "verified")


def test_without_verification_bits_pass_and_it_is_said(one_rank, copied, config):
    flip(copied / "checkpoints" / NEWEST / "__0_0.distcp")
    choice = choose(config(verify=False))
    assert choice.checkpoint.path.name == NEWEST
    assert "checkpoint.verify=false" in told(choice, "unverified")


def test_an_old_checkpoint_is_taken_and_it_is_said(one_rank, copied, config):
    for path in (copied / "checkpoints").glob("step_*"):
        make_old(path)
    choice = choose(config())
    assert choice.checkpoint.path.name == NEWEST
    assert "before there were manifests" in told(choice, "unverified")
    assert choice.line.ancestors == ((None, 3),)


@pytest.mark.parametrize("content", [None, "", "\n", "step_00000099\n", "../../x"])
def test_a_lost_latest_costs_nothing(one_rank, copied, config, content):
    latest = copied / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    choice = choose(config())
    assert choice.checkpoint.path.name == NEWEST
    assert str(latest) in told(choice, "latest_lost")


def test_the_latest_is_obeyed(one_rank, copied, config):
    (copied / "checkpoints" / "latest").write_text("step_00000001")
    choice = choose(config())
    assert choice.progress["step"] == 1 and not told(choice, "latest_lost")
    left = told(choice, "left_alone")
    assert "step_00000002 (" in left and "step_00000003 (" in left and "step_00000001" not in left


def test_going_back_to_a_damaged_one_never_takes_a_later_one(one_rank, copied, config):
    (copied / "checkpoints" / "latest").write_text("step_00000002")
    flip(copied / "checkpoints" / "step_00000002" / "__0_0.distcp")
    assert choose(config()).progress["step"] == 1


def test_a_named_step_is_taken_or_refused(one_rank, copied, config):
    asked = config(resume="must", resume_step=2)
    assert choose(asked).progress["step"] == 2
    flip(copied / "checkpoints" / "step_00000002" / "__1_0.distcp")
    with pytest.raises(DamagedCheckpointError, match="__1_0.distcp: expected sha256"):
        choose(asked)
    with pytest.raises(ConfigError, match="resume_step=9.*step_00000001, step_00000002"):
        choose(config(resume="must", resume_step=9))


def test_nothing_whole_is_an_error_and_no_start_from_scratch(one_rank, copied, config):
    for path in (copied / "checkpoints").glob("step_*"):
        flip(path / "__0_0.distcp")
    with pytest.raises(DamagedCheckpointError) as caught:
        choose(config())
    for text in (NEWEST, "step_00000002/__0_0.distcp", "step_00000001/__0_0.distcp", "another"):
        assert text in str(caught.value)


CONTRADICTIONS = {
    "step": ({"step": 2}, "step=2"),
    "samples": ({"samples": 1}, "samples=1, but the saved state holds 12"),
    "ranks": ({"world_size": 4}, "world_size=4, but 2 ranks saved it"),
    "ledger": ({"ledger": {"version": 1}}, "ledger="),
    "no layout": ({"layout": None}, "has no 'layout'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_state_that_contradicts_the_data_is_damage(one_rank, copied, config, name):
    facts, words = CONTRADICTIONS[name]
    change_state(copied / "checkpoints" / NEWEST, **facts)
    reseal(copied / "checkpoints" / NEWEST)
    choice = choose(config())
    assert choice.progress["step"] == 2 and words in told(choice, "damaged")


def test_initial_weights_are_verified(one_rank, copied, config, tmp_path):
    flip(copied / "checkpoints" / NEWEST / "__0_0.distcp")
    wanted = config(initial_weights=str(copied))
    wanted = wanted.model_copy(update={"output_directory": tmp_path / "second"})
    with pytest.raises(DamagedCheckpointError, match="others in .*step_00000001"):
        choose(wanted)


def _choose(rank_info: RankInfo, config: RunConfig) -> tuple[str, str]:
    from equilibrium_mcore.parallel import process_groups

    process_groups.join(rank_info, config.parallelism, seed=1)
    choice = choose(config)
    return choice.checkpoint.path.name, told(choice, "damaged"), choice.line


def test_ranks_share_the_hashing_and_agree(ranks, copied, config):
    """The damaged file is the second rank's share; both know of it."""
    flip(copied / "checkpoints" / NEWEST / "__0_0.distcp")
    flip(copied / "checkpoints" / NEWEST / "__1_0.distcp")
    first, second = ranks.run(2, _choose, config())
    assert first == second and first[0] == "step_00000002"
    assert "__0_0.distcp" in first[1] and "__1_0.distcp" in first[1]
