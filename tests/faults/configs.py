"""Settings that nobody should give: checked, and where `--check` accepts them, started.

`config_case` draws a change to a run's file, its command line, its files or its launcher. The check
must end with 0 or 2 and without a traceback; what it accepts must start.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from equilibrium_mcore.config.installation import CONFIGS
from tests.faults.bench import expect
from tests.support.attempts import TRACEBACK, Attempt, attempt
from tests.support.materials import Materials, materials, menagerie, train

CHECK_SECONDS = 180  # for a hang alone
START_SECONDS = 300
SMALL_RUN = 4096  # tokens and widths up to which an accepted run is started


class Case(NamedTuple):
    """What is given to the check, and then to the start."""

    told: str
    words: list[str]
    environment: dict[str, str]
    starts: bool = True  # whether it may be started at all


def config_case(rng: random.Random, folder: Path) -> str:
    """Draw a change, check it, start it where that is accepted; what was tried and what came of it.

    Raises BrokenPromiseError for a traceback, a hang, another exit status than 0 and 2, and for
    what is accepted and does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    case = rng.choice(KINDS)(rng, folder, materials())
    checked = attempt(
        train,
        [*case.words, "--check"],
        environment=case.environment,
        folder=folder,
        seconds=CHECK_SECONDS,
    )
    _expect_told(case, checked, "--check")
    if checked.status == 2:
        return f"{case.told}: refused: {_first_problem(checked)}"
    if not (case.starts and _is_small(checked.text)):
        return f"{case.told}: accepted, not started"
    started = attempt(
        train, case.words, environment=case.environment, folder=folder, seconds=START_SECONDS
    )
    _expect_told(case, started, "the start")
    expect(started.status == 0, f"what --check accepts starts: {case.told}", started.text[-3000:])
    return f"{case.told}: accepted, and it starts"


def _expect_told(case: Case, found: Attempt, what: str) -> None:
    text = found.text[-3000:]
    expect(found.status is not None, f"{what} ends: {case.told}", text)
    expect(TRACEBACK not in found.text, f"{what} has no traceback: {case.told}", text)
    expect(
        found.status in (0, 2), f"{what} ends with 0 or 2, not {found.status}: {case.told}", text
    )


def _first_problem(found: Attempt) -> str:
    lines = [line for line in found.text.splitlines() if line.strip().startswith("1.")]
    return (lines or [found.last_line])[0].strip()[:160]


def _is_small(text: str) -> bool:
    """Whether the effective config that the check printed trains a step in seconds."""
    start = text.find("stage:")
    if start < 0:
        return False
    try:
        values = yaml.safe_load(text[start:].split("\ntokenizer ")[0])
    except yaml.YAMLError:
        return False
    training, model = values["training"], values["model"]
    parallelism = values["parallelism"]
    world = parallelism["world_size"] or 1
    for name in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
        world *= parallelism[name]
    tokens = training["sequence_length"] * training["global_batch_size"]
    widths = [number for number in _numbers(model) if isinstance(number, int)]
    loaders = values["data"].get("num_workers", 0)
    return (
        tokens <= SMALL_RUN
        and world <= 2
        and max(widths) <= SMALL_RUN
        and len(model["layer_pattern"]) <= 12
        and loaders <= 2
        and values["data"].get("prefetch_factor", 1) <= 64
        and training["stop_after_steps"] == 1
    )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


# ----------------------------------------------------------------------------- what may be changed

INTEGERS = (
    0, -1, 1, 2, 3, 5, 7, 16, 31, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63,
    2**64, 10**30,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 1.0, 0.5, 0.999999999, 1.0000001, 5e-324, 1e-308, 1e-45, 1e38, 1e300, -1.0, -1e-9,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "a" * 300, "a" * 5000, "é世界", "~", "/", "..", ".", "$NOT_SET_ANYWHERE", "~nobody/x",
    "a\x00b", "a\nb", "*", "[", "]", "[!", "a: b", "null", "true", "1", "1e3", "none", "auto",
    "/dev/null", "/proc/1/mem", "\u202e", "%s%n", "{}", "a/b", "-1", "0,0,0", "1,1,1,1", "nan,1",
    "1e999,1", "100", "99,1", "1e-300,1", "🙂",
)  # fmt: skip
ODD = (None, [], {}, [None], [[]], {"a": 1}, True, False, [1, 2], ["a"], "1", 1.5, {"": 0})
OVERRIDES = (
    "*-|*-", "*x", "&x", "&x [*x]", "!x", "!!python/name:os.system", "@", "%", "`", "'", '"',
    "{from: llama_1b}", "{from: /}", "{from: " + "x" * 300 + "}", "[" * 2000, "- a", "? a",
    "a: b: c", "#", "|", ">",
)  # fmt: skip
LINES = (
    "a: *a", "a: &a [*a]", "&x name: y", "? [1, 2]\n: 3", "<<: {name: merged}", "<<: 3",
    "<<: [*missing]", "name: !!python/object:os.system x", "name: !!binary aaaa", "!!set {a, b}",
    "name: 2024-01-01", "name: 12:30:45", "name: 0o17", "name: 1_000", "name: yes", "name: .inf",
    "name: 1" + "0" * 5000, "name: 0x" + "f" * 5000, "training: {steps: 1e400}", "%YAML 1.1",
    "---\na: 1\n---\nb: 2", "\tname: tab", "name: 'open", "name: \"\\x00\"", "- 1", "null: 1",
    "1: 2", "true: 1", "~: 1", "[1]: 2", "name: " + "[" * 3000, "name: " + "{a: " * 2000,
    "name: |\n  text\n more", "name: >\n", "training:", "model:", "data:", "optimizer: ",
    "@name: 1", "`: 1", "name: @x", "name: `x`", "name: %x", "name: !x y", "name: *x",
)  # fmt: skip


def _swap(rng: random.Random, folder: Path, m: Materials) -> Case:
    """One or two settings with a value at the border of its type, or of another type."""
    values = _small_values(m, folder)
    told = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(list(_leaves(values)))
        odd = _borderline(rng, _at(values, path))
        _set(values, path, odd)
        told.append(f"{'.'.join(map(str, path))}={_short(odd)}")
    return _written(values, folder, ", ".join(told))


def _remove(rng: random.Random, folder: Path, m: Materials) -> Case:
    values = _small_values(m, folder)
    path = rng.choice(list(_places(values)))
    holder = _at(values, path[:-1])
    del holder[path[-1]]
    return _written(values, folder, f"without {'.'.join(map(str, path))}")


def _add(rng: random.Random, folder: Path, m: Materials) -> Case:
    values = _small_values(m, folder)
    sections = [()] + [p for p in _places(values) if isinstance(_at(values, p), dict)]
    section = rng.choice(sections)
    key = rng.choice(("", " ", "seed", "Steps", "from", "type", "name", "x" * 500, "é", "a.b", "0"))
    _at(values, section)[key] = value = rng.choice((*ODD, *TEXTS[:8], *INTEGERS[:4]))
    told = f"{'.'.join(map(str, section))} with {_short(key)}: {_short(value)}"
    return _written(values, folder, told)


def _line(rng: random.Random, folder: Path, m: Materials) -> Case:
    """A line of YAML that is added to the file, at its head or its end."""
    case = _written(_small_values(m, folder), folder, "")
    file = Path(case.words[0])
    line, text = rng.choice(LINES), file.read_text()
    file.write_text(f"{line}\n{text}" if rng.random() < 0.5 else f"{text}\n{line}\n")
    return case._replace(told=f"the line {_short(line)}")


def _override(rng: random.Random, folder: Path, m: Materials) -> Case:
    case = _written(_small_values(m, folder), folder, "")
    values = _small_values(m, folder)
    path = ".".join(map(str, rng.choice([*_places(values), ("model",), ("data",)])))
    texts = (*TEXTS, *OVERRIDES, *map(str, INTEGERS), *map(str, FLOATS))
    text = rng.choice(texts).replace("\x00", "\\0")
    key = rng.choice((path, path, path, path + ".x", path + ".0", "." + path, path + ".", "", " "))
    return case._replace(
        told=f"{key}={_short(text)}", words=[*case.words, f"{key}={text}"], starts=key == path
    )


def _file(rng: random.Random, folder: Path, m: Materials) -> Case:
    """Something else than a run's file."""
    paths = menagerie(folder / "odd")
    good = _written(_small_values(m, folder), folder, "")
    file = Path(good.words[0])
    content = file.read_bytes()
    name = rng.choice(("bom", "utf16", "latin", "nul", "cut", "comment", "crlf", *paths))
    if name in paths:
        return Case(f"the run file is {name}", [str(paths[name])], {})
    changed = {
        "bom": b"\xef\xbb\xbf" + content,
        "utf16": content.decode().encode("utf-16"),
        "latin": content + "# Gr\xfc\xdfe".encode("latin-1"),
        "nul": content + b"\x00",
        "cut": content[: rng.randrange(len(content))],
        "comment": content + b"#" * (1 << 20),
        "crlf": content.replace(b"\n", b"\r\n"),
    }[name]
    file.write_bytes(changed)
    return good._replace(told=f"the run file: {name}")


def _reference(rng: random.Random, folder: Path, m: Materials) -> Case:
    """A path among the settings that leads to something else."""
    values = _small_values(m, folder)
    paths = menagerie(folder / "odd")
    name = rng.choice(list(paths))
    odd = str(paths[name])
    key = rng.choice(
        ("model", "data", "model.from", "data.from", "data.tokenizer.model", "output_directory",
         "data.sources.0.prefix", "checkpoint.initial_weights", "data.cache_directory")
    )  # fmt: skip
    parts = key.split(".")
    if parts[-1] == "from":
        values[parts[0]] = {"from": odd}
    else:
        _set(values, [int(p) if p.isdigit() else p for p in parts], odd)
    return _written(values, folder, f"{key} is {name}")


def _damaged(rng: random.Random, folder: Path, m: Materials) -> Case:
    """A bit of the data or its tokenizer is another one, or a file is cut short."""
    values = _small_values(m, folder)
    copy_of = folder / "data"
    copy_of.mkdir()
    for path in (m.folder / "data").iterdir():
        (copy_of / path.name).write_bytes(path.read_bytes())
    values["data"]["tokenizer"]["model"] = str(copy_of / "tokenizer.model")
    for source in values["data"]["sources"]:
        source["prefix"] = str(copy_of / Path(source["prefix"]).name)
    victims = [
        p for p in sorted(copy_of.iterdir()) if p.suffix in (".bin", ".idx", ".json", ".model")
    ]
    victim = rng.choice(victims)
    content = bytearray(victim.read_bytes())
    how = rng.choice(("bit", "cut", "empty", "gone", "other", "longer"))
    if how == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "longer":
        content += b"\0" * 7
    elif how == "empty":
        content.clear()
    elif how == "other":
        content = bytearray(rng.randbytes(200))
    victim.write_bytes(content)
    if how == "gone":
        victim.unlink()
    # One flipped bit among the tokens is for the samples of hashes to find, not for the check.
    return _written(values, folder, f"{victim.name}: {how}")._replace(
        starts=how != "bit" or victim.suffix != ".bin"
    )


def _launcher(rng: random.Random, folder: Path, m: Materials) -> Case:
    """Variables of torchrun and Slurm that cannot be. They are only checked."""
    case = _written(_small_values(m, folder), folder, "")
    good = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511"}  # fmt: skip
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # fmt: skip
    variables = dict(rng.choice((good, slurm)))
    name = rng.choice(list(variables))
    how = rng.choice(("", " ", "x", "-1", "1.5", "99999999999", "1e3", "٣", "0x1", None))
    if how is None:
        del variables[name]
    else:
        variables[name] = how
    return case._replace(told=f"{name}={how!r}", environment=variables, starts=False)


def _checkpoint(rng: random.Random, folder: Path, m: Materials) -> Case:
    """What a run resumes or starts from."""
    values = _small_values(m, folder)
    weights = rng.choice((str(m.run), str(m.run / "checkpoints"), str(m.folder), None))
    values["checkpoint"]["initial_weights"] = weights
    values["checkpoint"]["resume"] = resume = rng.choice(("auto", "never", "must"))
    values["checkpoint"]["resume_step"] = step = rng.choice((None, 0, 1, 10**8, 10**12))
    told = f"weights {weights and Path(weights).name}, resume {resume}, step {step}"
    if rng.random() < 0.5:
        key, value = rng.choice(
            (
                ("hidden_size", 48),
                ("layer_pattern", "M-M-"),
                ("vocab_size", 640),
                ("vocab_size", 500),
            )
        )
        values["model"][key] = value
        told += f", model.{key}={value}"
    return _written(values, folder, told)


def _shipped(rng: random.Random, folder: Path, m: Materials) -> Case:
    """A shipped run with a changed setting; its data is elsewhere, so it is only checked."""
    file = rng.choice(sorted([*CONFIGS.glob("runs/*.yaml"), *CONFIGS.glob("experiments/*.yaml")]))
    values = yaml.safe_load(file.read_text())
    path = rng.choice(list(_leaves(values)))
    odd = _borderline(rng, _at(values, path))
    key, text = ".".join(map(str, path)), _flow(odd)
    told = f"{file.name} {key}={_short(odd)}"
    words = [str(file), f"{key}={text}", "--host", "gpu"]
    return Case(told, [word.replace("\x00", "\\0") for word in words], {}, starts=False)


KINDS: tuple[Callable[[random.Random, Path, Materials], Case], ...] = (
    *(_swap,) * 6, _remove, _add, _line, *(_override,) * 2, _file, _reference, _damaged, _launcher,
    _checkpoint, _shipped,
)  # fmt: skip


# --------------------------------------------------------------------------------- the inside


def _small_values(m: Materials, folder: Path) -> dict[str, Any]:
    values = copy.deepcopy(m.values(folder / "run"))
    values["training"]["stop_after_steps"] = 1
    return values


def _written(values: dict[str, Any], folder: Path, told: str) -> Case:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Case(told, [str(file)], {})


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key and index, sections too."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _at(value: Any, path: Any) -> Any:
    for part in path:
        value = value[part]
    return value


def _set(values: Any, path: Any, value: Any) -> None:
    _at(values, path[:-1])[path[-1]] = value


def _borderline(rng: random.Random, now: Any) -> Any:
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(now, bool):
        return rng.choice((not now, not now, *ODD))
    if isinstance(now, int):
        return rng.choice((*INTEGERS, now + 1, max(now - 1, 0), now * 2))
    if isinstance(now, float):
        return rng.choice((*FLOATS, now * 2, -now))
    if isinstance(now, str):
        return rng.choice(TEXTS)
    return rng.choice((*ODD, *INTEGERS[:6], *FLOATS[:5], *TEXTS[:6]))


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"
