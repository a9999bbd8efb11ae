"""Files and overrides that are no settings: each ends in one error in words, and none in a hang."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import MOST_SHOWN, ConfigError
from equilibrium_mcore.config.load import load_model, load_run, load_run_config
from equilibrium_mcore.config.yaml_io import MOST_BYTES, parse_yaml, read_mapping
from equilibrium_mcore.files.paths import expand_path, report_path

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
# YAML, and what is said of it.
REFUSED = {
    "a: &a [*a]": "line 1: the alias *a stands inside what &a names",
    "a: &a {b: {c: *a}}": "line 1: the alias *a stands inside what &a names",
    BOMB: "values, counting what aliases",
    "[" * 100_000: "line 1: nested more than 64 levels deep",
    "{a: " * 100_000: "line 1: nested more than 64 levels deep",
    "- " * 100_000 + "a": "line 1: nested more than 64 levels deep",
    "\n" + "- 1\n" * 200_001: "more than 200,000 values",
    "a: *b": "line 1, column 4: found undefined alias",
    "a:\n\tb: 1": "the line begins with a tab: indent by spaces",
    "a: \0": "line 1: the character U+0000 is not allowed",
    "a: 1\nb: 'x": "line 2, column",
    "a: \udcff": "is not UTF-8",
    "a: 1\n---\nb: 2": "but found another document",
    "a: 1" + "0" * 5000: "has 5,001 digits",
    "a: 0x" + "f" * 5000: "has 5,002 digits",
    "a: !!int x": "line 1: 'x' is no int",
    "a: !!bool maybe": "line 1: 'maybe' is no bool",
    "a: !!timestamp x": "the tag !!timestamp is not read here",
    "a: !!binary x": "the tag !!binary is not read here",
    "a: !!python/object:os.system x": "the tag !!python/object:os.system is not read here",
    "a: !!map [1]": "the tag !!map is not read here",
    "a: !b c": "the tag !b is not read here",
    "<<: 3": "expected a mapping",
    "? [1]\n: 2": "line 1: a key must be plain text; found [1]",
    "a: 1\na: 2": "line 2: key 'a' is given twice",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text[:20]))
def test_yaml_that_is_not_read(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, source="file.yaml")
    assert REFUSED[text] in str(caught.value) and "file.yaml" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_yaml_that_is_read() -> None:
    text = "a: &x {b: 1}\nc: {<<: *x, d: 010}\ne: 12:30\nf: no\ng: !!str 3\nh: 2024-01-01\n"
    assert parse_yaml("\ufeff" + text, source="") == {
        "a": {"b": 1}, "c": {"b": 1, "d": 10}, "e": "12:30", "f": "no", "g": "3",
        "h": "2024-01-01",
    }  # fmt: skip
    deep = "[" * 60 + "]" * 60
    assert parse_yaml(deep, source="") is not None


def test_what_is_no_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would wait for ever
    for name, words in {
        "missing.yaml": "no such file",
        "pipe.yaml": "a pipe or a device, not a file",
        ".": "a folder, not a file",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_run(tmp_path / name)
        with pytest.raises(ConfigError, match=words):
            read_mapping(tmp_path / name)
    file.write_bytes(b"name: mine\n# Gr\xfc\xdfe\n")
    with pytest.raises(ConfigError, match=r"line 2: byte 0xfc is not UTF-8: save"):
        load_run(file)
    file.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(ConfigError, match="more than 8 MiB"):
        load_run(file)


def test_thousands_of_unknown_keys_are_counted(run_file: Path) -> None:
    lines = "".join(f"key_{number}: 1\n" for number in range(5000))
    run_file.write_text(run_file.read_text() + lines + "x" * 1000 + ": 1\n")
    with pytest.raises(ConfigError) as caught:
        load_run(run_file)
    assert len(caught.value.problems) == 5001  # each is known, though few are explained
    told = str(caught.value)
    assert "key_0: unknown key" in told and f"... and {5001 - MOST_SHOWN:,} more" in told
    run_file.write_text(run_file.read_text().replace("key_", "trainingx"))


def test_unexplained_problems_keep_their_section_from_the_rules(run_file: Path) -> None:
    overrides = [f"checkpoint.key_{number}=1" for number in range(200)]
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [*overrides, "training.steps=0"])
    told = "\n".join(caught.value.problems)
    assert "checkpoint.key_0: unknown key" in told and "more problems" in told


@pytest.mark.parametrize("text", ["*-|*-", "*", "&x", "!x", "%", "@", "`", "#1"])
def test_an_override_of_text_is_taken_as_text(run_file: Path, text: str) -> None:
    assert load_run(run_file, [f"description={text}"]).description == text
    attention = "{num_heads: 4, num_query_groups: 2, head_dim: 16}"
    mlp = "{ffn_hidden_size: 64}"
    changes = [f"model.attention={attention}", f"model.mlp={mlp}"]
    if set(text) <= set("*-|"):
        assert load_run(run_file, [*changes, f"model.layer_pattern={text}"]).model.layer_pattern
    with pytest.raises(ConfigError):  # of a number it is none
        load_run(run_file, [f"training.steps={text}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=/", "model='/': no such file"),
        ("model=..", "model='..': no such file"),
        ("data=/", "data='/': no such file"),
        ("model={from: " + "x" * 300 + "}", "a name of 300 bytes is longer than the 255"),
        ("model={from: 'a\\0b'}", "no such file"),
        ('model={from: "a\\0b"}', "no file name holds the character NUL"),
        ("output_directory=", "must be text"),
        ("output_directory=' '", "a path is empty"),
        ("training.steps=1e400", "training.steps=inf: must be a finite number"),
        ("training.seed=9223372036854775808", "training.seed=9223372036854775808: must lie"),
        ("training.steps=1000000000000000001", "must be at most 1000000000000000"),
        ("parallelism.timeout_minutes=43201", "must be at most 43200"),
        ("optimizer.adamw.epsilon=5e-324", "must be at least 1e-30"),
        ("optimizer.adamw.learning_rate=1e31", "must be at most 1e+30"),
        ("model.mamba.num_heads=9223372036854775807", "must be at most 1000000000000000"),
        ("data.num_workers=300", "must be at most 256"),
        ("data.sources." + "9" * 5000 + ".weight=1", "is not one of its indices"),
        ("name=" + "[" * 3000, "nested more than 64 levels"),
    ],
    ids=lambda text: text[:30],
)
def test_an_override_that_cannot_be(run_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [override])
    assert len(caught.value.problems) == 1, caught.value
    assert words in str(caught.value)


def test_a_model_that_cannot_be() -> None:
    for name in ("/", ".", "..", "x" * 300, "a\0b"):
        with pytest.raises(ConfigError):
            load_model(name)


def test_a_report_in_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "report")
    with pytest.raises(ArgumentTypeError, match="a circle of links"):
        report_path(str(tmp_path / "loop"))
    assert report_path(str(tmp_path / "link")) == tmp_path / "report"


def test_paths_that_no_file_system_takes() -> None:
    for text in ("a\0b", "x" * 256, "/".join(["x" * 200] * 30), "", "  "):
        with pytest.raises(ValueError, match="NUL|longer than|empty"):
            expand_path(text)
    assert expand_path("x" * 255).name == "x" * 255


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check", "--host"], "--host : must be one of this, gpu"),
        (["--check", "--host", "cluster"], "--host cluster: must be one of this, gpu"),
        (["--host", "gpu"], "--host is for --check"),
        (["--host=this"], "--host is for --check"),
    ],
)
def test_hosts_that_are_none(run_file: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_run_config([str(run_file), *arguments])


def test_the_host_that_a_check_judges_by(run_file: Path, capsys) -> None:
    seen = []
    fp16 = [str(run_file), "training.precision=fp16", "--check"]
    for host, other in (("gpu", True), ("this", False)):
        with pytest.raises(SystemExit if other else ConfigError):
            load_run_config(
                [*fp16, "--host", host], host=cpu(), also_check=lambda c, away: seen.append(away)
            )
    assert seen == [True] and "precision: fp16" in capsys.readouterr().out


def cpu():
    from equilibrium_mcore.config.rule_kit import Host

    return Host()
