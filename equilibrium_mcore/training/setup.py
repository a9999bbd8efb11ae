"""From a config to everything that a training loop needs, built in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from equilibrium_mcore.adapters.lora import attach_adapters
from equilibrium_mcore.adapters.targets import coverage
from equilibrium_mcore.checkpoint.choose import StartingPoint, choose
from equilibrium_mcore.checkpoint.roles import Role
from equilibrium_mcore.checkpoint.sharded import load_checkpoint, load_weights
from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import (
    data_parallel_size,
    is_interleaved,
    micro_batches_per_step,
)
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.left_out import LeftOut
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.stream import Batch, DatasetStream, TrainStream
from equilibrium_mcore.models.provider import build_model
from equilibrium_mcore.models.transformer_config import build_transformer_config
from equilibrium_mcore.optim.frozen import freeze, frozen_beside_adapters, frozen_names
from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.parallel import accelerator, process_groups
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.processes.console import say
from equilibrium_mcore.training.all_objectives import build_objective
from equilibrium_mcore.training.anomalies import Watch
from equilibrium_mcore.training.objective import Objective
from equilibrium_mcore.training.ready import check_start
from equilibrium_mcore.training.run_data import build_run_datasets, left_out_of, with_steps

logger = logging.getLogger(__name__)

Weights = Literal["current", "evaluation"]


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class Run:
    """A run in the middle of its work, on one rank."""

    config: RunConfig
    groups: ProcessGroupCollection
    transformer: TransformerConfig
    chunks: list[torch.nn.Module]  # DDP-wrapped, one per virtual pipeline stage
    optimizer: HybridOptimizer
    objective: Objective
    datasets: Datasets
    data_parallel_size: int
    micro_batches: int
    choice: StartingPoint = field(
        default_factory=StartingPoint
    )  # what it starts from, and its line
    progress: Progress = field(default_factory=Progress)
    resumed_from: Path | None = None
    stream: TrainStream | None = None  # made once the run knows where it stands
    left_out: LeftOut = field(default_factory=LeftOut)  # samples that are passed over
    # Adds to whole micro-batches, of training and validation, before they are weighed. Collective.
    prepare: Callable[[Run, list[Batch]], None] = lambda run, batches: None
    stage_figures: Callable[[], dict[str, float]] = dict  # logged beside the objective's
    positions: int = 0  # of all sequences that this process trained on, over all ranks
    roles: dict[str, Role] = field(default_factory=dict)  # models that train beside, by name
    # Whether the step to come leaves the weights as they are, e.g. until a critic is of use.
    holds: Callable[[Run], bool] = lambda run: False
    watch: Watch | None = None  # judges every step, where `training.anomalies` is set

    def progress_to_save(self) -> dict[str, Any]:
        """Progress and where the data stands, as plain values."""
        values = {**asdict(self.progress), **self.stream.state()}
        if self.left_out:
            values["left_out"] = self.left_out.as_lists()
        if self.watch is not None:
            values["anomalies"] = self.watch.state()
        return values

    def ranges_of_next_step(self, *, and_before: int = 0) -> list[list[int]]:
        """Samples of the next step and of so many before it: [first, count] by position."""
        size, done = self.config.training.global_batch_size, self.progress.samples
        first = self.left_out.position_of(max(0, done - and_before * size))
        return [[first, self.left_out.position_of(done + size - 1) + 1 - first]]

    @contextmanager
    def weights(self, which: Weights) -> Iterator[list[torch.nn.Module]]:
        """The run's chunks with these weights, inside; with the present ones after it. Collective.

        `current`: those at which the next gradient is taken. `evaluation`: those that are
        evaluated and saved, schedule-free training's average; otherwise the same.

        Raises ValueError for another name.
        """
        if which == "current":
            yield self.chunks
        elif which == "evaluation":
            with self.optimizer.evaluation_weights():
                yield self.chunks
        else:
            raise ValueError(f"weights {which!r}: a run has 'current' and 'evaluation'")

    @property
    def is_first_rank(self) -> bool:
        return torch.distributed.get_rank() == 0

    @property
    def last_step(self) -> int:
        """The step at which this process stops."""
        training = self.config.training
        return min(training.steps, training.stop_after_steps or training.steps)

    def stream_of(self, dataset: Samples, *, consumed_samples: int) -> TrainStream:
        """This rank's micro-batches of `dataset`."""
        return DatasetStream(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self.config.training.micro_batch_size,
            data_parallel_rank=self.groups.dp.rank(),
            data_parallel_size=self.data_parallel_size,
            num_workers=self.config.data.num_workers,
            prefetch_factor=self.config.data.prefetch_factor,
            pin_memory=accelerator.has_cuda(),
        )


def setup(config: RunConfig, rank_info: RankInfo, *, datasets: Datasets | None = None) -> Run:
    """Groups, data, model, optimizer, and the checkpoint to resume from. Collective.

    `datasets` stand in for those that `config.data` describes, e.g. made-up tokens in a benchmark.

    Raises ConfigError before anything is built when this host cannot do what the config asks for.
    """
    problems = rules.check(config, world_size=rank_info.world_size, host=describe_host())
    if problems:
        raise ConfigError(problems, source=f"run {config.name}")
    tell = say if rank_info.rank == 0 else lambda text: None
    config = with_steps(config, say=tell)
    groups = process_groups.join(
        rank_info,
        config.parallelism,
        seed=config.training.seed,
        graphs=bool(config.training.cuda_graphs),
    )
    choice = choose(config)
    # Before data of another run is read.
    check_start(config, checkpoint=choice.checkpoint, weights=choice.weights)
    if datasets is None:
        datasets = build_run_datasets(config, choice.progress, say=tell)
    transformer, chunks = build_chunks(config, groups)
    optimizer = HybridOptimizer(chunks, groups, config)
    transformer.grad_scale_func = optimizer.scale_loss
    run = Run(
        config=config,
        groups=groups,
        transformer=transformer,
        chunks=chunks,
        optimizer=optimizer,
        objective=build_objective(config.objective),
        datasets=datasets,
        data_parallel_size=data_parallel_size(config, rank_info.world_size),
        micro_batches=micro_batches_per_step(config, rank_info.world_size),
        choice=choice,
        left_out=left_out_of(config, choice.progress),
        watch=config.training.anomalies and Watch(config.training.anomalies),
    )
    resume(run)
    run.stream = run.stream_of(datasets.train, consumed_samples=run.progress.samples)
    if run.is_first_rank:
        Path(config.output_directory).mkdir(parents=True, exist_ok=True)
        save_config(config, Path(config.output_directory) / "config.yaml")
    return run


@contextmanager
def run_alone(config: RunConfig, *, datasets: Datasets | None = None) -> Iterator[Run]:
    """The run set up on this process as its one rank; its groups and data are left at the end.

    The layout of `config` must be of one rank. `datasets` as for `setup`.
    """
    try:
        run = setup(config, RankInfo.alone(), datasets=datasets)
        try:
            yield run
        finally:
            run.stream.close()
            _let_go(run.chunks)
    finally:
        process_groups.destroy()


def _let_go(chunks: list[torch.nn.Module]) -> None:
    """Let the memory of chunks be freed with the last reference to them.

    megatron-core's DDP holds the nodes of autograd that add to its parameters' gradients, which
    hold DDP through its hooks; so does the graph of the last tensors that its token dispatchers
    keep. Such cycles lead through C++, where Python's collector does not see them.
    """
    for chunk in chunks:
        getattr(chunk, "grad_accs", []).clear()
        for part in chunk.modules():
            kept = vars(getattr(part, "token_dispatcher", part))
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    kept[name] = None


def build_chunks(
    config: RunConfig, groups: ProcessGroupCollection, *, trainable: bool = True
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """This rank's model chunks, wrapped so that their gradients are reduced over data ranks.

    Those that are not `trainable` are bare, in eval mode, and have no gradients nor room for them.
    """
    on_gpu = accelerator.has_cuda()
    layout, training = config.parallelism, config.training
    if not trainable:  # megatron-core captures all graphs of a process once, after its first step
        training = training.model_copy(update={"cuda_graphs": []})
    transformer = build_transformer_config(config.model, layout, training, on_gpu=on_gpu)
    frozen = frozen_names(config.model, training.frozen)
    if config.adapters is not None:
        transformer.moe_router_bias_update_rate = 0.0  # no gradient moves it, and it is the base's
        coverage(config.model, config.adapters)  # raises for targets that name nothing
        frozen = frozen_beside_adapters(config.model)
    chunks = []
    for stage in range(layout.virtual_pipeline):
        virtual_stage = stage if is_interleaved(layout) else None
        process_groups.set_virtual_stage(virtual_stage)
        module = build_model(
            config.model,
            layout,
            training,
            groups,
            on_gpu=on_gpu,
            virtual_stage=virtual_stage,
            transformer_config=transformer,
        )
        freeze(
            module,
            frozen,
            model=config.model,
            recomputes=training.recompute != "none",
        )
        if config.adapters is not None and trainable:
            attach_adapters(
                module,
                config.adapters,
                model=config.model,
                groups=groups,
                seed=config.training.seed,
            )
        if on_gpu:
            module.cuda()
        if not trainable:
            chunks.append(module.requires_grad_(False).eval())
            continue
        reduction = DistributedDataParallelConfig(
            # Of gradients as wide as float64, which only proofs have, nothing is cut off.
            grad_reduce_in_fp32=transformer.params_dtype != torch.float64,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            bucket_size=layout.gradient_bucket_size,
            use_distributed_optimizer=False,
        )
        wrapped = DistributedDataParallel(transformer, reduction, module, pg_collection=groups)
        wrapped.broadcast_params()
        chunks.append(wrapped)
    if not trainable:
        return transformer, chunks
    transformer.finalize_model_grads_func = finalize_model_grads
    if layout.overlap_grad_reduce:
        transformer.no_sync_func = [chunk.no_sync for chunk in chunks]
        if len(chunks) == 1:
            transformer.no_sync_func = chunks[0].no_sync
    return transformer, chunks


def resume(run: Run) -> None:
    """Load what was chosen: a checkpoint to continue, or weights to start from."""
    config, choice = run.config, run.choice
    if choice.checkpoint is not None:
        progress = load_checkpoint(
            choice.checkpoint,
            config=config,
            chunks=run.chunks,
            optimizer=run.optimizer,
            groups=run.groups,
        )
        # What else it holds is where the data stands, at which the datasets were built.
        run.progress = Progress(**{f.name: progress[f.name] for f in fields(Progress)})
        run.resumed_from = choice.checkpoint.path
        if run.watch is not None and "anomalies" in progress:
            run.watch.load(progress["anomalies"])
    elif choice.weights is not None:
        load_weights(
            choice.weights,
            config=config,
            chunks=run.chunks,
            optimizer=run.optimizer,
            groups=run.groups,
        )


def teardown(run: Run) -> None:
    """Leave the process groups in order, after every rank is done."""
    torch.distributed.barrier()
    run.stream.close()
    process_groups.destroy()
