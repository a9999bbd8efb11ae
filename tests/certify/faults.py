"""Faults as users of such systems report them, planted in a rank one at a time.

Each function breaks the code of the process it runs in. `python -m tests.certify.faults OUT`
certifies every one of them, and the healthy code, and writes what the certificates said as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.certify import generation_faults as generation
from tests.certify import objective_faults as objectives
from tests.certify import online_faults as online
from tests.certify import small_faults as small


def context_split_over_the_wrong_group() -> None:
    from types import SimpleNamespace

    from equilibrium_mcore.training import step

    cut = step.rank_batch
    step.rank_batch = lambda batch, run, **names: cut(
        batch,
        SimpleNamespace(config=run.config, groups=SimpleNamespace(cp=run.groups.tp)),
        **names,
    )


def norm_gradients_not_summed_under_sequence_parallelism() -> None:
    from equilibrium_mcore.models.norms import RMSNorm

    build = RMSNorm.__init__

    def broken(self, config, hidden_size, eps=1e-5):
        build(self, config, hidden_size, eps)
        self.weight.sequence_parallel = False

    RMSNorm.__init__ = broken


def expert_gradients_off_by_expert_parallel() -> None:
    from equilibrium_mcore.training import setup

    finish = setup.finalize_model_grads

    def broken(model, *args, **kwargs):
        finish(model, *args, **kwargs)
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if ".local_experts." in name:
                    parameter.main_grad *= 2

    setup.finalize_model_grads = broken


def gate_norm_over_the_wrong_group() -> None:
    from equilibrium_mcore.models.norms import GroupRMSNorm

    build = GroupRMSNorm.__init__

    def broken(self, hidden_size, *args, **kwargs):
        build(self, hidden_size, *args, **kwargs)
        self.group_size = hidden_size  # all channels of the rank: fewer under tensor parallelism

    GroupRMSNorm.__init__ = broken


def documents_not_told_apart_when_packed() -> None:
    from equilibrium_mcore.models import mamba

    mamba._documents_of = lambda packed_seq_params: None


def packed_documents_cut_as_one_sequence() -> None:
    import torch

    from equilibrium_mcore.training import schedule

    cut = schedule.rank_tokens
    schedule.rank_tokens = lambda lengths, **cp: cut(torch.stack([lengths.sum()]), **cp)


def rope_not_offset_under_context_parallelism() -> None:
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda emb, seq_dim, cp_group: emb[
        : emb.shape[0] // cp_group.size()
    ]


def blockwise_muon() -> None:
    import torch

    from equilibrium_mcore.optim import matrix

    matrix.whole_parts = lambda local, parts, **split: [local]
    matrix.local_slice = lambda pieces, parts, **split: torch.cat(pieces)


def main_weights_not_refreshed() -> None:
    from equilibrium_mcore.optim.optimizer import HybridOptimizer

    HybridOptimizer.refresh_main_weights = lambda self: None


def momentum_not_resumed() -> None:
    _forget_when_loading(lambda optimizer, parameter: optimizer.state_of(parameter), "momentum")


def preconditioners_not_resumed() -> None:
    _forget_when_loading(lambda optimizer, parameter: optimizer.whole_state_of(parameter), "left")


def _forget_when_loading(state_of: Callable, prefix: str) -> None:
    from equilibrium_mcore.checkpoint import sharded

    load = sharded.load_optimizer_state

    def broken(optimizer, state):
        load(optimizer, state)
        for parameter in optimizer.parameters:
            if parameter.is_owned:
                for key, tensor in state_of(optimizer, parameter).items():
                    if key.startswith(prefix):
                        tensor.zero_()

    sharded.load_optimizer_state = broken


def attention_scaled_by_half_of_the_key() -> None:
    """Wrong in the reference too: only the witness sees it."""
    from equilibrium_mcore.models.attention import TorchCoreAttention

    build = TorchCoreAttention.__init__

    def broken(self, config, *args, **kwargs):
        build(self, config, *args, **kwargs)
        self.softmax_scale = config.qk_head_dim**-0.5  # the part with position is left out

    TorchCoreAttention.__init__ = broken


def norms_with_an_epsilon_of_1e_6() -> None:
    """Wrong in the reference too: only the witness sees it."""
    from equilibrium_mcore.models.norms import RMSNorm

    build = RMSNorm.__init__
    RMSNorm.__init__ = lambda self, *args, **kwargs: build(self, *args, **{**kwargs, "eps": 1e-6})


def adapter_gradients_not_summed_under_sequence_parallelism() -> None:
    """Each rank's factors learn from its own positions and rows (mcore-bridge#173)."""
    from equilibrium_mcore.adapters.lora import LoraAdapter

    LoraAdapter._summed = lambda self, factor: factor


def scalar_head_gradient_not_summed_under_sequence_parallelism() -> None:
    """Each rank's copy of the head learns from its own positions."""
    from equilibrium_mcore.models.heads import ScalarHead

    build = ScalarHead.__init__

    def broken(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    ScalarHead.__init__ = broken


def healthy() -> None:
    """Nothing is broken."""


class Case(NamedTuple):
    """What a fault's certificate must say."""

    layout: str
    what: str  # the quantity in which it shows
    where: str  # a parameter or place that is named there
    overrides: tuple[str, ...] = ()  # of the run
    everywhere: bool = False  # planted in the reference, too


# One micro-batch per step, as a balancing loss over the whole batch needs.
GLOBAL = ("training.micro_batch_size=8", "model.moe.load_balancing=global_aux_loss")
ADAPTERS = ("adapters={rank: 4}",)
PACKED = ("data.packing=documents", "training.micro_batch_size=1")
# The run's own objective is replaced in every rank, the reference's too.
PAIRS = (*PACKED, "objective.type=sft", "model.moe.aux_loss_coefficient=0.01")
SFT = ("objective.type=sft",)
SCORES = (
    "stage=orpo",  # which needs no weights
    "model.head=scalar",
    "training.validation_interval_steps=0",
    "model.moe.load_balancing=none",
    "objective={type: reward_model}",
    "data={type: preferences, name: made_up, sources: [{name: made_up, train: [made_up.jsonl]}], "
    "tokenizer: {type: SentencePieceTokenizer, model: made_up.model}}",
)
DISTILLED = ("stage=distill", "objective={type: distillation, teacher: runs/teacher}")
POLICY = (
    *PACKED,
    "objective={type: policy, preset: dr_grpo, constant_length: 50}",
    "model.moe.load_balancing=none",
    "model.moe.expert_bias_update_rate=0",
)
GSPO = (
    *PACKED,
    "objective={type: policy, preset: gspo, clip_low: 0.02, clip_high: 0.02}",
    *POLICY[-2:],
)
EXPECTED: dict[Callable[[], None], Case] = {
    healthy: Case("tp=2,cp=2,ep=2", "", "", PACKED),
    context_split_over_the_wrong_group: Case("tp=2,cp=2", "loss of every step", "step 1"),
    norm_gradients_not_summed_under_sequence_parallelism: Case("tp=2", "gradients", "norm"),
    expert_gradients_off_by_expert_parallel: Case("ep=2", "gradients", "mlp.experts.experts"),
    gate_norm_over_the_wrong_group: Case("tp=2", "loss of every step", "step 1"),
    documents_not_told_apart_when_packed: Case("tp=2", "packed documents", "document 1"),
    packed_documents_cut_as_one_sequence: Case("cp=2", "loss of every step", "step 1", PACKED),
    rope_not_offset_under_context_parallelism: Case("cp=2", "gradients", "embedding"),
    adapter_gradients_not_summed_under_sequence_parallelism: Case(
        "tp=2", "gradients", "adapter", ADAPTERS
    ),
    scalar_head_gradient_not_summed_under_sequence_parallelism: Case(
        "tp=2", "gradients", "scalar_head.weight", SCORES
    ),
    blockwise_muon: Case("tp=2", "update from given gradients", "decoder.layers.0.mixer"),
    main_weights_not_refreshed: Case("tp=2", "bf16: main weights", "decoder.layers"),
    momentum_not_resumed: Case("tp=2", "optimizer momentum", "decoder.layers.0.mixer"),
    preconditioners_not_resumed: Case(
        "tp=2", "optimizer left_basis", "decoder.layers.0.mixer", ("optimizer.matrices=soap",)
    ),
    small.expert_gradients_a_hair_too_large_on_one_rank: Case(
        "ep=2", "gradients", "mlp.experts.experts"
    ),
    small.norm_epsilon_rounded_to_bfloat16: Case("tp=2", "loss of every step", "step 1"),
    small.rope_angles_off_by_a_millionth_under_context_parallelism: Case(
        "cp=2", "gradients", "decoder.layers.2.input_layernorm"
    ),
    small.norms_compute_in_float32: Case("tp=2", "were not float64", "small_faults.py"),
    small.expert_bias_follows_the_tokens_of_one_data_rank: Case(
        "dp=2", "weights after 1 step", "router.expert_bias"
    ),
    small.global_balancing_divided_by_the_data_ranks_twice: Case(
        "dp=2", "auxiliary loss of every step", "step 1", GLOBAL
    ),
    small.recomputation_gives_other_numbers: Case(
        "ep=2", "gradients", "embedding", ("training.recompute=full",)
    ),
    generation.another_seed_in_sampling_on_one_rank: Case("dp=2", "generated tokens", "answer"),
    generation.decoding_forgets_the_latest_input_of_the_convolution: Case(
        "tp=2", "log-probabilities in training", "answer"
    ),
    objectives.pairs: Case("tp=2,cp=2,ep=2", "", "", PAIRS, everywhere=True),
    objectives.pairs_not_summed_over_context: Case(
        "cp=2", "gradients", "embedding", PAIRS, everywhere=True
    ),
    objectives.pairs_given_as_the_divisor: Case(
        "dp=2", "balancing losses", "embedding", PAIRS, everywhere=True
    ),
    objectives.slices_of_the_vocabulary_taken_for_the_whole: Case(
        "tp=2", "loss of every step", "step 1", DISTILLED
    ),
    objectives.ratios_of_a_part_of_an_answer: Case("cp=2", "loss of every step", "step 1", GSPO),
    online.expert_bias_moves: Case("tp=2", "experts' bias", "rank 0", POLICY, everywhere=True),
    online.old_log_probabilities_after_the_update: Case(
        "tp=2", "second update", "step 2", POLICY, everywhere=True
    ),
    online.one_rank_has_another_seed: Case("tp=2", "tokens that differ", "rank 0", POLICY),
}
HEALTHY = (healthy, objectives.pairs)

# Wrong in every layout and on one rank alike.
SEEN_BY_THE_WITNESS: dict[Callable[[], None], Case] = {
    attention_scaled_by_half_of_the_key: Case("tp=2", "loss of every step", "step 1"),
    norms_with_an_epsilon_of_1e_6: Case("", "gradients", "model."),
    objectives.mask_shifted_by_one: Case("tp=2", "loss of every step", "step 1", SFT),
}


def main() -> int:
    """Certify every case of EXPECTED in this process, or those named after OUT."""
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()
    accelerator.quiet_libraries()
    from equilibrium_mcore.certify.certificate import certify
    from equilibrium_mcore.certify.twin import parse_layout
    from equilibrium_mcore.config.load import load_run

    root = Path(__file__).parents[2]
    said = {}
    names = sys.argv[2:]
    for fault, case in EXPECTED.items():
        if names and fault.__name__ not in names:
            continue
        config = load_run(root / "configs" / "runs" / "quickstart.yaml", list(case.overrides))
        layouts = [parse_layout(case.layout, base=config.parallelism)]
        certificate = certify(config, layouts, prepare=fault, everywhere=case.everywhere)
        said[fault.__name__] = certificate.as_dict()
        Path(sys.argv[1]).write_text(json.dumps(said))
    for fault, case in SEEN_BY_THE_WITNESS.items():
        if not case.layout or (names and fault.__name__ not in names):
            continue
        config = load_run(root / "configs" / "runs" / "quickstart.yaml", list(case.overrides))
        layouts = [parse_layout(case.layout, base=config.parallelism)]
        everywhere = certify(config, layouts, prepare=fault, everywhere=True, witness=True)
        said[fault.__name__] = everywhere.as_dict()
        Path(sys.argv[1]).write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
