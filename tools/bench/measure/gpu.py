"""What one device can do, and what training makes of it: `tools/bench/gpu.py` prints this.

The roofs are measured in the same process as the training, because data sheets are not reached.
The training is `training.setup` and `training.step` themselves, on made-up tokens.
`docs/reference/performance.md` defines every figure.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from equilibrium_mcore.config import rules
from equilibrium_mcore.config.load import load_model, run_from_mapping
from equilibrium_mcore.config.pattern import CUT, ByKind, count_kinds
from equilibrium_mcore.config.schema import (
    MambaConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
)
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.models.flops import training_flops_per_token
from equilibrium_mcore.models.parameters import count_parameters
from equilibrium_mcore.optim.muon import Muon
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.training.setup import Run, run_alone
from equilibrium_mcore.training.step import train_step
from tools.bench.measure.gpu_cases import Case, last_blocks
from tools.bench.measure.gpu_report import Report, Roofs, TrainingFigures, versions
from tools.bench.measure.out_of_memory import is_out_of_memory
from tools.bench.measure.timing import median_seconds

GIB = 2**30
# What the estimate of memory may fill, of what is free: it is rough, and the allocator needs room.
MEMORY_SHARE = 0.90


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is trained, and how long."""

    model: str = "equilibrium_3b"
    sequence_length: int = 4096
    sequences_per_step: int = 16  # 65,536 tokens: a device's share in configs/runs/pretrain_3b.yaml
    warmup_steps: int = 3
    steps: int = 8
    time_limit_seconds: float = 400.0


REHEARSAL = BenchmarkSettings(
    model="equilibrium_tiny", sequence_length=64, sequences_per_step=2, warmup_steps=1, steps=2
)


def run_benchmark(
    plan: BenchmarkSettings,
    *,
    cases: tuple[Case, ...],
    done: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure the roofs, then train each case.

    What this host lacks, or what fails, is named in `not_run` with the reason. `done` is called
    with what is known after each, so that a limit of time costs no figure.
    """
    report = Report(describe_host().device_name, versions(), measure_roofs())
    release()  # what the roofs held, before a size is chosen
    done(report)
    for case in cases:
        try:
            with case.variables():
                report.training.append(train(plan, case, report.roofs))
        except Exception as error:  # one case's failure must not cost the others' figures
            report.not_run[case.name] = f"{type(error).__name__}: {error}"
        release()
        done(report)
    return report


# ------------------------------------------------------------------------------------ the roofs


def measure_roofs() -> Roofs:
    """Matrix and copy roofs. On a CPU host the sizes are tiny and the figures mean nothing."""
    on_gpu = accelerator.has_cuda()
    sizes = (4096, 8192, 12288) if on_gpu else (256,)
    bf16 = max(_product_tflops(size, torch.bfloat16) for size in sizes)
    fp8 = None
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        fp8 = max(_product_tflops(size, torch.float8_e4m3fn) for size in sizes)
    elements = GIB if on_gpu else 2**20
    source = torch.randint(0, 127, (elements,), dtype=torch.int8, device=accelerator.device())
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    return Roofs(bf16, fp8, copy_gb_per_second=2 * elements / seconds / 1e9)


def _product_tflops(size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product. Random operands: zeros run faster than any real data."""
    device = accelerator.device()
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        right = right.t()  # this product wants its second operand by columns

        def product() -> torch.Tensor:
            return torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
    else:

        def product() -> torch.Tensor:
            return left @ right

    return 2 * size**3 / median_seconds(product) / 1e12


# -------------------------------------------------------------------------------- the training


class UniformTokens(Samples):
    """Samples of uniformly random tokens; sample i is the same in every call."""

    def __init__(self, *, samples: int, sequence_length: int, vocab_size: int) -> None:
        self.samples, self.length, self.vocab = samples, sequence_length, vocab_size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        text = np.random.default_rng(index).integers(0, self.vocab, self.length + 1)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "position_ids": np.arange(self.length),
            "loss_mask": np.ones(self.length, dtype=np.float32),
        }


def train(plan: BenchmarkSettings, case: Case, roofs: Roofs) -> TrainingFigures:
    """Train the largest cut of the case's model that fits. Raises ValueError where nothing fits."""
    model = case.model(load_model(plan.model))
    blocks = model.layer_pattern.count(CUT) + 1
    estimates = []
    for kept, micro_batch in case.sizes(blocks, plan.sequences_per_step):
        cut = last_blocks(model, kept)
        tokens = micro_batch * plan.sequence_length
        needed = memory_estimate_gib(cut, precision=case.precision, micro_batch_tokens=tokens)
        estimates.append(f"{kept} blocks at micro batch {micro_batch}: {needed:.0f} GiB")
        if needed > MEMORY_SHARE * _free_memory_gib():
            continue
        config = run_config(cut, plan, case, micro_batch_size=micro_batch)
        try:
            figures = _train_once(config, plan, roofs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release()  # the estimate was too low: the next smaller one
            continue
        share = f"{kept} of {blocks}"
        return replace(figures, case=case.name, blocks=share, estimated_memory_gib=needed)
    raise ValueError(
        f"{model.name} does not fit in {_free_memory_gib():.0f} GiB: {'; '.join(estimates)}"
    )


def run_config(
    model: ModelConfig, plan: BenchmarkSettings, case: Case, *, micro_batch_size: int
) -> RunConfig:
    """The run of one measurement. Raises ValueError where this host cannot do it."""
    no_file = "made_up_tokens"
    config = run_from_mapping(
        {
            "name": "benchmark",
            "output_directory": no_file,  # replaced when the run starts
            "model": model.model_dump(mode="json"),
            "data": {
                "name": no_file,
                "tokenizer": {"type": "SentencePieceTokenizer", "model": f"{no_file}.model"},
                "sources": [{"name": no_file, "prefix": no_file, "weight": 1.0}],
            },
            "training": {
                "sequence_length": plan.sequence_length,
                "micro_batch_size": micro_batch_size,
                "global_batch_size": plan.sequences_per_step,
                "steps": plan.warmup_steps + plan.steps,
                **case.run_training(),
            },
            "parallelism": case.parallelism,
            "optimizer": {"muon": {"matmul_precision": "medium", "extra_scale": 0.2}},
            "checkpoint": {"resume": "never"},
        }
    )
    problems = rules.check(config, world_size=1, host=describe_host())
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _train_once(config: RunConfig, plan: BenchmarkSettings, roofs: Roofs) -> TrainingFigures:
    torch.cuda.reset_peak_memory_stats()
    training = config.training
    tokens_per_step = plan.sequences_per_step * plan.sequence_length
    tokens = UniformTokens(
        samples=training.steps * training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    start = time.perf_counter()
    with temporary_folder("equilibrium_bench_") as folder:
        config = config.model_copy(update={"output_directory": folder})
        with run_alone(config, datasets=Datasets(tokens, None, None)) as run:
            losses, seconds, optimizer, muon = [], [], [], []
            with _optimizer_clock(run) as clock:
                for step in range(plan.warmup_steps + plan.steps):
                    before = time.perf_counter()
                    losses.append(train_step(run).loss)
                    _wait()
                    if step >= plan.warmup_steps:
                        seconds.append(time.perf_counter() - before)
                        optimizer.append(clock["all"])
                        muon.append(clock["muon"])
                        if time.perf_counter() - start > plan.time_limit_seconds:
                            break
    step_seconds = statistics.median(seconds)
    rate = tokens_per_step / step_seconds
    tflops = rate * training_flops_per_token(config.model, training.sequence_length) / 1e12
    roof = roofs.fp8_tflops if training.precision == "fp8" else roofs.bf16_tflops
    return TrainingFigures(
        precision=training.precision,
        model=config.model.name,
        micro_batch_size=training.micro_batch_size,
        sequence_length=training.sequence_length,
        sequences_per_step=plan.sequences_per_step,
        measured_steps=len(seconds),
        seconds_per_step=step_seconds,
        tokens_per_second=rate,
        model_tflops=tflops,
        share_of_roof=tflops / roof,
        optimizer_share=statistics.median(optimizer) / step_seconds,
        muon_share=statistics.median(muon) / step_seconds,
        peak_memory_gib=accelerator.memory_gib(),
        first_loss=losses[0],
        last_loss=losses[-1],
    )


@contextlib.contextmanager
def _optimizer_clock(run: Run) -> Iterator[dict[str, float]]:
    """Seconds of the last step in the whole optimizer (`all`) and in Muon (`muon`)."""
    clock = {"all": 0.0, "muon": 0.0}
    plain, began = run.optimizer.step, {}

    def timed_step():
        _wait()
        start = time.perf_counter()
        result = plain()
        _wait()
        clock["all"] = time.perf_counter() - start
        return result

    def before(optimizer, args, kwargs) -> None:
        if isinstance(optimizer, Muon):
            _wait()
            began["muon"] = time.perf_counter()

    def after(optimizer, args, kwargs) -> None:
        if isinstance(optimizer, Muon):
            _wait()
            clock["muon"] = time.perf_counter() - began["muon"]

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    run.optimizer.step = timed_step
    try:
        yield clock
    finally:
        del run.optimizer.step  # the method of the class again
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------------------- the memory


def memory_estimate_gib(model: ModelConfig, *, precision: str, micro_batch_tokens: int) -> float:
    """Rough need of one device that holds the whole model: it chooses a size, nothing more.

    Per parameter: weight 2 bytes, main weight 4, gradient 4, and Muon's momentum 4 or AdamW's two
    moments 8; in FP8 the quantized weights, by rows and by columns, 2 more.
    """
    counts = count_parameters(model).by_kind
    tables = counts["embedding"] + counts.get("output", 0)
    matrices = sum(counts.values()) - tables  # and vectors, which weigh nothing beside them
    static = matrices * (14 + 2 * (precision == "fp8")) + tables * 18
    transient = 6 * GIB  # Muon's batches, the norm of the largest gradient, work space, CUDA itself
    return (static + transient + micro_batch_tokens * activation_bytes_per_token(model)) / GIB


def activation_bytes_per_token(model: ModelConfig) -> int:
    """What forward keeps per token for backward, in bf16 without recomputation; rough."""
    hidden, counts = model.hidden_size, count_kinds(model.layer_pattern)
    layers = sum(
        number * (8 * hidden + ACTIVATIONS[kind](getattr(model, kind), hidden))
        for kind, number in counts.items()
    )
    return layers + 14 * model.padded_vocab_size  # logits, and their float32 copies in the loss


def _mamba_activations(mamba: MambaConfig, hidden: int) -> int:
    inner, states = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    return 2 * (6 * inner + 2 * states)


def _mla_activations(mla: MLAConfig, hidden: int) -> int:
    widths = 2 * (mla.qk_nope_head_dim + mla.qk_rope_head_dim) + 2 * mla.v_head_dim
    return 2 * 2 * mla.num_heads * widths


def _moe_activations(moe: MoEConfig, hidden: int) -> int:
    routed = moe.top_k * (2 * hidden + 8 * moe.expert_ffn_hidden_size)
    return 2 * (routed + 6 * moe.shared_ffn_hidden_size) + 16 * moe.num_experts


ACTIVATIONS: ByKind[Callable[[Any, int], int]] = {
    "mamba": _mamba_activations,
    "mla": _mla_activations,
    "attention": lambda attention, _: 2 * 4 * attention.num_heads * attention.head_dim,
    "mlp": lambda mlp, _: 2 * 4 * mlp.ffn_hidden_size,
    "moe": _moe_activations,
}
"""Bytes per token of one layer beside its norm, from the section and the hidden size."""


def _free_memory_gib() -> float:
    if not accelerator.has_cuda():
        return float("inf")
    return torch.cuda.mem_get_info()[0] / GIB


def release() -> None:
    """Give back what finished or failed work held: cycles, cuBLAS's room, the allocator's cache."""
    gc.collect()
    if accelerator.has_cuda():
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def _wait() -> None:
    torch.cuda.synchronize()
