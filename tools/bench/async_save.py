"""Time that training waits for a checkpoint: written in place, and beside training.

A model is trained on one rank of this host on made-up tokens; each way saves the same state several
times, taking turns. In place, training waits until the files are on the disk and hashed; beside
it, until the state is copied. The status is 1 where the second is more than a tenth of the first.

Example:
    python tools/bench/async_save.py --model llama_1b --layers 4 --folder /scratch/bench
The disk of the folder is what is measured. The first save of each way, which finds its memory, is
reported apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.parallel import accelerator

WANTED = 0.1


def main() -> int:
    """Parse the command line, save in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama_1b", help="a file, or a name in configs/models")
    add("--layers", type=int, default=4, help="letters kept of its pattern; default 4")
    add("--saves", type=int, default=4, help="of each way; default 4")
    add("--folder", type=user_path, help="where the checkpoints go; default the system's temporary")
    options = parser.parse_args()
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times = _measure(Path(folder), options)
    return _print(times)


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(seconds that training waited, seconds until the checkpoint was in place) of each save."""
    from equilibrium_mcore.checkpoint.background import Background, InPlace
    from equilibrium_mcore.checkpoint.save import begin_save, bytes_of_state, finish_save
    from equilibrium_mcore.training.setup import teardown
    from equilibrium_mcore.training.step import train_step

    run = _run(folder, options)
    train_step(run)
    writers = {"in place": InPlace(), "beside training": Background()}
    writers["beside training"].reserve(bytes_of_state(run.optimizer))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for number in range(options.saves):
        for name, writer in writers.items():
            progress = {**run.progress_to_save(), "step": number}
            start = time.perf_counter()
            save = begin_save(
                config=run.config.model_copy(
                    update={"output_directory": str(folder / name.replace(" ", "_"))}
                ),
                chunks=run.chunks,
                optimizer=run.optimizer,
                progress=progress,
                line=run.choice.line,
                writer=writer,
            )
            begun = time.perf_counter()
            while not writer.is_done():
                time.sleep(0.01)
            done = time.perf_counter()
            finish_save(save)
            end = time.perf_counter()
            times[name].append((begun - start + end - done, end - start))
    for writer in writers.values():
        writer.close()
    _say_size(folder)
    teardown(run)
    return times


def _run(folder: Path, options: argparse.Namespace):
    from equilibrium_mcore.config.load import load_model, run_from_mapping
    from equilibrium_mcore.config.pattern import CUT
    from equilibrium_mcore.data.blend import Datasets
    from equilibrium_mcore.parallel.launch import RankInfo
    from equilibrium_mcore.training.setup import setup
    from tools.bench.measure.gpu import UniformTokens

    model = load_model(options.model)
    pattern = model.layer_pattern.replace(CUT, "")[: options.layers]
    values = {**model.model_dump(mode="json"), "layer_pattern": pattern}
    config = run_from_mapping(
        {
            "name": "async_save",
            "output_directory": str(folder / "run"),
            "model": values,
            "data": {
                "name": "made_up",
                "tokenizer": {"type": "SentencePieceTokenizer", "model": str(folder / "none")},
                "sources": [{"name": "none", "prefix": str(folder / "none"), "weight": 1.0}],
            },
            "training": {
                "sequence_length": 64,
                "global_batch_size": 1,
                "steps": 10,
                "precision": "fp32",
            },
            "checkpoint": {"keep_last": 1, "resume": "never"},
        }
    )
    tokens = UniformTokens(samples=10, sequence_length=64, vocab_size=model.vocab_size)
    datasets = Datasets(train=tokens, validation=tokens, test=tokens)
    return setup(config, RankInfo.alone(), datasets=datasets)


def _say_size(folder: Path) -> None:
    newest = max((folder / "in_place" / "checkpoints").glob("step_*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    print(f"checkpoint: {size / 2**30:.2f} GiB\n")


def _print(times: dict[str, list[tuple[float, float]]]) -> int:
    print("| written | training waits, s | first save, s | in place after, s |")
    print("|---|---:|---:|---:|")
    waits = {}
    for name, found in times.items():
        later = found[1:] or found
        waits[name] = statistics.median(wait for wait, _ in later)
        until = statistics.median(total for _, total in later)
        print(f"| {name} | {waits[name]:.3f} | {found[0][0]:.3f} | {until:.3f} |")
    ratio = waits["beside training"] / waits["in place"]
    print(f"\nratio of the waits: {ratio:.3f} (wanted: {WANTED} at most)")
    return 0 if ratio <= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
