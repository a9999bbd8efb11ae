"""Storing what a teacher says of a run's samples: its likeliest ids, once, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.checkpoint.choose import open_weights_together
from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import data_parallel_size, micro_batches_per_step
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.files.lock import FileLock
from equilibrium_mcore.files.lock_file import LockHeldError
from equilibrium_mcore.models.transformer_config import build_transformer_config
from equilibrium_mcore.objectives.distillation import CHUNK_ELEMENTS, LEAST_LOG, log_softmax
from equilibrium_mcore.parallel import accelerator, process_groups
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.processes.console import say
from equilibrium_mcore.training.all_objectives import build_objective
from equilibrium_mcore.training.distillation import Slice, across_ranks
from equilibrium_mcore.training.run_data import build_run_datasets, with_steps
from equilibrium_mcore.training.schedule import rank_batch
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.target_files import (
    PARTS,
    PartWriter,
    TargetRows,
    finish,
    is_whole,
    row_type,
    sample_keys,
    write_settings,
)
from equilibrium_mcore.training.teacher import KEY, HiddenStates, Teacher

Say = Callable[[str], object]
PART_BYTES = 2**26


def store_rank(rank_info: RankInfo, *, config: RunConfig) -> None:
    """Store targets for the whole run `config`, as this rank. What is there is not made again.

    Raises ConfigError for a run without teacher or targets, and for a folder of other targets.
    """
    tell = say if rank_info.rank == 0 else lambda text: None
    if problems := rules.check(config, world_size=rank_info.world_size, host=describe_host()):
        raise ConfigError(problems, source=f"run {config.name}")
    config = with_steps(config, say=tell)
    groups = process_groups.join(rank_info, config.parallelism, seed=config.training.seed)
    folder = Path(config.objective.targets)
    weights = config.objective.teacher
    opened = open_weights_together(weights, verify=config.checkpoint.verify, key=KEY)
    with _alone(folder, config.name):
        on_first_rank(lambda: write_settings(folder, config, opened))
        if on_first_rank(lambda: is_whole(folder)):
            tell(f"{folder}: whole already")
        else:
            _store(_without_student(config, groups, rank_info.world_size, tell), folder, tell)
        torch.distributed.barrier()
    process_groups.destroy()


def _without_student(
    config: RunConfig, groups: ProcessGroupCollection, world_size: int, tell: Say
) -> Run:
    """The run as far as its data and its layout."""
    return Run(
        config=config,
        groups=groups,
        transformer=build_transformer_config(
            config.model, config.parallelism, config.training, on_gpu=accelerator.has_cuda()
        ),
        chunks=[],
        optimizer=None,
        objective=build_objective(config.objective),
        datasets=build_run_datasets(config, say=tell),
        data_parallel_size=data_parallel_size(config, world_size),
        micro_batches=micro_batches_per_step(config, world_size),
    )


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Inside, no other process stores in `folder`. Collective; raises ConfigError."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), name)

    def take() -> None:
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except LockHeldError as error:
            raise ConfigError(
                f"another process stores targets there: {error}",
                source=f"objective.targets={folder}",
            ) from None

    on_first_rank(take)
    try:
        yield
    finally:
        lock.release()  # without effect where it was not taken


def _store(run: Run, folder: Path, tell: Say) -> None:
    teacher = Teacher(run, run.config.objective.teacher)
    dtype = row_type(run.config.training.sequence_length, run.config.objective.top_k)
    names = [path.name for path in sorted(folder.glob(PARTS))]
    known, groups = TargetRows(folder, names, dtype), run.groups
    mine = groups.tp.rank() == groups.cp.rank() == 0 and groups.pp.rank() == groups.pp.size() - 1
    writer = PartWriter(folder, rank=groups.dp.rank(), dtype=dtype, most_bytes=PART_BYTES)
    torch.distributed.barrier()  # no rank adds a part before every rank has seen those before
    written: set[int] = set()
    for number, batches in enumerate(_batches(run)):
        keys = [sample_keys(batch) for batch in batches]
        new = any(int(k) not in written and int(k) not in known for ks in keys for k in ks)
        if not _anywhere(new):
            continue
        for batch, said, its_keys in zip(
            batches, teacher.hidden_states(run, batches), keys, strict=True
        ):
            if said is None:
                continue
            ids, log_q = _of_whole(run, batch, said)
            for row, key in enumerate(map(int, its_keys)):
                if mine and key not in written and key not in known:
                    writer.add(key, ids[row], log_q[row])
        written.update(int(k) for ks in keys for k in ks)
        if number % 100 == 99:
            tell(f"{folder}: {number + 1:,} steps")
    if mine:
        writer.flush()
    torch.distributed.barrier()
    size = on_first_rank(lambda: finish(folder))
    tell(f"{folder}: whole, {size / 2**30:,.3f} GiB")


def _batches(run: Run) -> Iterator[list[Batch]]:
    """Those of every step, and of a validation."""
    training = run.config.training
    yield from _of_dataset(run, run.datasets.train, training.steps)
    if run.datasets.validation is not None and training.validation_interval_steps:
        yield from _of_dataset(run, run.datasets.validation, training.validation_batches)


def _of_dataset(run: Run, dataset: Samples, steps: int) -> Iterator[list[Batch]]:
    stream = run.stream_of(dataset, consumed_samples=0)
    for _ in range(steps):
        yield stream.next_batches(run.micro_batches)
    stream.close()


def _anywhere(here: bool) -> bool:
    """Whether it is so on some rank. Collective."""
    flag = torch.tensor(float(here), device=accelerator.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


@torch.no_grad()
def _of_whole(run: Run, batch: Batch, said: HiddenStates) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, S, K] and log q [B, S, K + 1] of a whole micro-batch. Collective over TP and CP."""
    shape, k = batch["labels"].shape, run.config.objective.top_k
    place = torch.arange(shape.numel()).view(shape)
    mine, _ = rank_batch({**batch, "place": place}, run, also=("place",))
    ids, log_q = likeliest_ids(run, mine, said)
    places = mine["place"].flatten()
    whole_ids = ids.new_zeros(shape.numel(), k)
    whole_log_q = log_q.new_zeros(shape.numel(), k + 1)
    whole_ids[places], whole_log_q[places] = ids, log_q
    if run.groups.cp.size() > 1:
        for values in (whole_ids, whole_log_q):
            torch.distributed.all_reduce(values, group=run.groups.cp)
    return (
        whole_ids.view(*shape, k).to(torch.int32).cpu().numpy(),
        whole_log_q.view(*shape, k + 1).float().cpu().numpy(),
    )


def likeliest_ids(run: Run, batch: Batch, said: HiddenStates) -> tuple[Tensor, Tensor]:
    """ids int64 [N, K], ascending, and log q [N, K + 1] of this rank's tokens. Collective over TP.

    Tensor ranks send each other their own likeliest ids, never logits.
    """
    tp, objective, model = run.groups.tp, run.config.objective, run.config.model
    width = model.padded_vocab_size // tp.size()
    rows = Slice(tp.rank() * width, width)
    real = min(max(model.vocab_size - rows.first, 0), width)
    of, count = said.of(batch, rows), batch["labels"].numel()
    at_once = max(1, CHUNK_ELEMENTS // width)
    across, parts = across_ranks(tp), []
    for first in range(0, count, at_once):
        logits_NV = of(slice(first, min(first + at_once, count)))[:, :real]
        log_q_NV = log_softmax(logits_NV, temperature=objective.temperature, across=across)
        ids_NK, top_NK = _joined_top(log_q_NV, objective.top_k, rows=rows, tp_group=tp)
        here_NK = (ids_NK >= rows.first) & (ids_NK < rows.first + real)
        rest_NV = log_q_NV.exp_()
        if real:
            index_NK = torch.where(here_NK, ids_NK - rows.first, 0)
            taken_NK = torch.where(here_NK, -rest_NV.gather(1, index_NK), 0.0)
            rest_NV.scatter_add_(1, index_NK, taken_NK)
        rest_N1 = across.sum(rest_NV.sum(-1)).log().clamp(min=LEAST_LOG)[:, None]
        parts.append((ids_NK, torch.cat([top_NK, rest_N1], dim=1)))
    return torch.cat([ids for ids, _ in parts]), torch.cat([log_q for _, log_q in parts])


def _joined_top(
    log_q_NV: Tensor, k: int, *, rows: Slice, tp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The likeliest of all slices: ids ascending, and their log q, [N, K]."""
    here = min(k, log_q_NV.shape[1])
    values_NK, ids_NK = log_q_NV.topk(here, dim=-1)
    missing = (0, k - here)
    values_NK = torch.nn.functional.pad(values_NK, missing, value=-torch.inf).contiguous()
    ids_NK = torch.nn.functional.pad(ids_NK + rows.first, missing).contiguous()
    if tp_group.size() > 1:
        of_all = []
        for mine in (values_NK, ids_NK):
            found = [torch.empty_like(mine) for _ in range(tp_group.size())]
            torch.distributed.all_gather(found, mine, group=tp_group)
            of_all.append(torch.cat(found, dim=1))
        values_NK, places_NK = of_all[0].topk(k, dim=-1)
        ids_NK = of_all[1].gather(1, places_NK)
    ids_NK, order_NK = ids_NK.sort(dim=-1)
    return ids_NK, values_NK.gather(1, order_NK)
