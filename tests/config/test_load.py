"""Reading runs: references, overrides, YAML's traps, all mistakes at once, and the saved copy."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import (
    load_model,
    load_run,
    load_run_config,
    run_from_mapping,
    save_config,
)
from equilibrium_mcore.config.yaml_io import parse_yaml


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return caught.value.problems


def replaced(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


# ------------------------------------------------------------------------------- references


def test_model_by_name_by_path_and_in_place(run_file: Path) -> None:
    by_name = load_run(run_file)
    model = run_file.parent / "models" / "mine.yaml"
    model.parent.mkdir()
    save = (Path(__file__).parents[2] / "configs/models/equilibrium_tiny.yaml").read_text()
    model.write_text(save)
    replaced(run_file, "model: equilibrium_tiny", "model: models/mine.yaml")
    assert load_run(run_file).model == by_name.model


def test_from_merges_key_by_key(run_file: Path) -> None:
    replaced(
        run_file,
        "model: equilibrium_tiny",
        "model: {from: equilibrium_tiny, layer_pattern: ME, moe: {top_k: 3}, mla: null}",
    )
    model = load_run(run_file).model
    assert (model.layer_pattern, model.moe.top_k, model.mla) == ("ME", 3, None)
    assert model.moe.num_experts == 8


def test_a_path_is_relative_to_the_run_file_then_to_here(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "m.yaml").write_text("{from: equilibrium_tiny, name: beside me}")
    replaced(run_file, "model: equilibrium_tiny", "model: m.yaml")
    assert load_run(run_file).model.name == "beside me"
    (run_file.parent / "m.yaml").write_text("{from: equilibrium_tiny, name: beside the run}")
    assert load_run(run_file).model.name == "beside the run"
    assert load_run(run_file, ["model=m.yaml"]).model.name == "beside me"


def test_missing_reference_names_places_and_known_models(run_file: Path) -> None:
    (problem,) = problems_of(run_file, "model=equilibrium_tiy")
    assert "equilibrium_tiy" in problem and "equilibrium_tiny" in problem and "tried" in problem


def test_a_problem_is_told_once(run_file: Path) -> None:
    replaced(run_file, "model: equilibrium_tiny", "model: absent")
    assert len(problems_of(run_file, "model.name=a", "model.hidden_size=1")) == 1


def test_files_that_name_each_other_are_refused(run_file: Path) -> None:
    (run_file.parent / "a.yaml").write_text("from: b.yaml")
    (run_file.parent / "b.yaml").write_text("from: a.yaml")
    replaced(run_file, "model: equilibrium_tiny", "model: a.yaml")
    (problem,) = problems_of(run_file)
    assert "circle" in problem


def test_load_model_checks_the_model() -> None:
    assert load_model("llama_1b").hidden_size == 2048
    with pytest.raises(ConfigError, match="no such file"):
        load_model("llama_2b")


# -------------------------------------------------------------------------------- overrides


def test_overrides_reach_everywhere(run_file: Path) -> None:
    config = load_run(
        run_file,
        [
            "training.steps=7",
            "model.moe.top_k=4",
            "data.sources.1.weight=0.5",
            "optimizer.muon.learning_rate=1e-4",  # the run file has no optimizer section
            "optimizer.adamw.learning_rates={embedding: 1e-3, ssm: 1}",
            "training.stop_after_steps=null",
            "name=a=b",
        ],
    )
    assert config.training.steps == 7
    assert config.model.moe.top_k == 4
    assert [source.weight for source in config.data.sources] == [0.7, 0.5]
    assert config.optimizer.muon.learning_rate == 1e-4
    assert config.optimizer.adamw.learning_rates == {"embedding": 1e-3, "ssm": 1.0}
    assert config.name == "a=b"


def test_overrides_apply_in_order_and_before_checks(run_file: Path) -> None:
    replaced(run_file, "steps: 100", "steps: wrong")
    assert load_run(run_file, ["training.steps=3", "training.steps=4"]).training.steps == 4
    config = load_run(run_file, ["training.steps=3", "model=llama_1b", "model.hidden_size=64"])
    assert (config.model.name, config.model.hidden_size) == ("llama_1b", 64)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.2.weight=1", ["data.sources is a list", "0, 1"]),
        ("data.sources.first.weight=1", ["'first'", "0, 1"]),
        ("training.steps.more=1", ["training.steps is 100", "no keys inside"]),
        ("training..steps=1", ["key.subkey=value"]),
        ("training.steps=[1", ["not valid YAML", "training.steps"]),
        ("training.stpes=1", ["did you mean 'steps'", "allowed keys"]),
        ("modle.name=x", ["did you mean 'model'"]),
    ],
)
def test_wrong_overrides(run_file: Path, override: str, words: list[str]) -> None:
    (problem,) = problems_of(run_file, override)
    assert all(word in problem for word in words), problem


# ------------------------------------------------------------------------------- YAML's traps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("65_536", 65536),
        ("010", 10),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("98,1,1", "98,1,1"),
        ("", None),
        ("~", None),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse_yaml(text, source="test")
    assert read == value and type(read) is type(value)


def test_a_key_given_twice_is_an_error(run_file: Path) -> None:
    replaced(run_file, "steps: 100,", "steps: 100, steps: 200,")
    (problem,) = problems_of(run_file)
    assert "'steps' is given twice" in problem and "line 10" in problem


def test_a_key_given_twice_in_a_model_file_names_that_file(run_file: Path) -> None:
    (run_file.parent / "m.yaml").write_text("from: equilibrium_tiny\nname: a\nname: b\n")
    (problem,) = problems_of(run_file, f"model={run_file.parent / 'm.yaml'}")
    assert "m.yaml" in problem and "'name' is given twice" in problem


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just text", "a: [1\n", "a: !!python/object:x 1", "a: \0"]
)
def test_files_that_are_no_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_run(tmp_path / "absent.yaml")


# ------------------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed=true", ["training.seed=true", "whole number"]),
        ("training.steps=1.5", ["training.steps=1.5", "whole number"]),
        ("training.steps='10'", ["training.steps='10'", "without quotes"]),
        ("training.steps=0", ["training.steps=0", "greater than 0", "optimizer steps"]),
        ("training.steps=null", ["training.steps: missing", "training.epochs"]),
        ("parallelism.sequence=yes", ["sequence='yes'", "true or false"]),
        ("parallelism.sequence=1", ["sequence=1", "true or false"]),
        ("optimizer.clip_gradient_norm=true", ["clip_gradient_norm=true", "a number"]),
        ("optimizer.clip_gradient_norm=.inf", ["clip_gradient_norm", "finite"]),
        ("optimizer.adamw.beta1=1.1", ["beta1=1.1", "at most 1"]),
        ("name=12", ["name=12", "quote"]),
        ("output_directory=12", ["output_directory=12", "quote"]),
        ("training.precision=bf1", ["precision='bf1'", "'fp32', 'bf16'", "did you mean 'bf16'"]),
        ("training={}", ["training.sequence_length: missing", "tokens per sequence"]),
        ("data.sources=[]", ["data.sources", "at least 1"]),
        ("data.sources={}", ["data.sources={}", "a list"]),
        ("model.moe=3", ["model.moe=3", "mapping"]),
        ("model=3", ["model=3", "mapping"]),
        ("optimizer.adamw.learning_rates={embd: 1}", ["embd", "did you mean 'embedding'"]),
    ],
)
def test_wrong_values(run_file: Path, override: str, words: list[str]) -> None:
    problems = problems_of(run_file, override)
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_good_values_of_other_types(run_file: Path) -> None:
    config = load_run(run_file, ["optimizer.clip_gradient_norm=1", "checkpoint.initial_weights=w"])
    assert type(config.optimizer.clip_gradient_norm) is float
    assert config.checkpoint.initial_weights == Path("w")
    assert config.output_directory == Path("runs/test")


def test_all_mistakes_at_once(run_file: Path) -> None:
    replaced(run_file, "steps: 100", "stpes: 100")
    overrides = [
        "modle=x",
        "model.hidden_size=wide",
        "model.moe.topk=2",
        "data.sources.9.weight=1",
        "optimizer.schedule.warmup_steps=-1",
        "parallelism={tensor: 2, context: 3}",
        "data.split=0",
    ]
    problems = problems_of(run_file, *overrides)
    for words in [
        ["modle", "did you mean 'model'"],
        ["model.hidden_size='wide'"],
        ["model.moe.topk", "did you mean 'top_k'"],
        ["data.sources", "0, 1"],
        ["warmup_steps=-1"],
        ["training.stpes", "did you mean 'steps'"],
        ["data.split=0", "quote"],
    ]:
        assert any(all(word in problem for word in words) for problem in problems), (
            words,
            problems,
        )


def test_rules_speak_about_the_sections_that_are_right(run_file: Path) -> None:
    problems = problems_of(run_file, "data.nmae=x", "parallelism.tensor=3", "training.seed=-1")
    text = "\n".join(problems)
    assert "data.nmae" in text and "training.seed" in text
    assert "parallelism.tensor=3 does not divide model.mamba.num_heads=16" in text


def test_error_numbers_its_problems_and_travels_between_processes() -> None:
    error = ConfigError(["first", "second"], source="run.yaml")
    assert str(error).splitlines() == ["2 problems in run.yaml:", "  1. first", "  2. second"]
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == error.problems and str(copy) == str(error)


# ---------------------------------------------------------------------- saving, command line


def test_save_and_load_again(run_file: Path, tmp_path: Path) -> None:
    names = ["1e-4", "yes", "010", "null", "a: b", "2024-01-01", "ü", " spaces "]
    for index, name in enumerate(names):
        config = load_run(run_file, ["optimizer.muon.learning_rate=1e-5"])
        config = config.model_copy(update={"name": name})
        path = tmp_path / "deep" / f"{index}.yaml"
        save_config(config, path)
        assert load_run(path) == config
    assert not list((tmp_path / "deep").glob(".*")), (
        "a file written under a temporary name was left behind"
    )


def test_saved_copy_does_not_need_the_model_file(run_file: Path, tmp_path: Path) -> None:
    model = run_file.parent / "m.yaml"
    model.write_text("{from: equilibrium_tiny, name: mine}")
    config = load_run(run_file, [f"model={model}"])
    save_config(config, tmp_path / "effective.yaml")
    model.unlink()
    assert load_run(tmp_path / "effective.yaml") == config


def test_run_from_mapping_leaves_its_argument_alone(run_file: Path) -> None:
    config = load_run(run_file)
    values = config.model_dump(mode="json")
    copy = config.model_dump(mode="json")
    assert run_from_mapping(values) == config
    assert values == copy


def test_command_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert load_run_config([str(run_file), "training.steps=3"]).training.steps == 3
    with pytest.raises(SystemExit) as stopped:
        load_run_config(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "parallelism" in shown and "docs/reference/configuration.md" in shown
    with pytest.raises(SystemExit) as stopped:
        load_run_config([str(run_file), "training.steps=3", "--check"])
    assert stopped.value.code == 0
    assert parse_yaml(capsys.readouterr().out, source="stdout")["training"]["steps"] == 3
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="data-parallel size 3"):
        load_run_config([str(run_file)])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [([], "found none"), (["a.yaml", "steps"], "found 2"), (["a.yaml", "--steps=3"], "--steps=3")],
)
def test_wrong_command_lines(arguments: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_run_config(arguments)


def test_config_imports_no_heavy_package() -> None:
    code = (
        "import sys, equilibrium_mcore.config.load, equilibrium_mcore.config.describe;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'megatron'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
