"""Faults a thousand times smaller than those of `faults.py`: float32 would hide most of them."""

from __future__ import annotations


def expert_gradients_a_hair_too_large_on_one_rank() -> None:
    """By 1e-5 on the second expert-parallel rank, as a rounded factor of its tokens would be."""
    from equilibrium_mcore.training import setup

    finish = setup.finalize_model_grads

    def broken(model, *args, pg_collection, **kwargs):
        finish(model, *args, pg_collection=pg_collection, **kwargs)
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if ".local_experts." in name and pg_collection.ep.rank() == 1:
                    parameter.main_grad *= 1 + 1e-5

    setup.finalize_model_grads = broken


def norm_epsilon_rounded_to_bfloat16() -> None:
    """1e-5 becomes 1.0014e-5 in every norm of a tensor-parallel rank."""
    import torch

    from equilibrium_mcore.models.norms import RMSNorm

    build = RMSNorm.__init__

    def broken(self, config, hidden_size, eps=1e-5):
        if config.tensor_model_parallel_size > 1:
            eps = torch.tensor(eps, dtype=torch.bfloat16).item()
        build(self, config, hidden_size, eps)

    RMSNorm.__init__ = broken


def rope_angles_off_by_a_millionth_under_context_parallelism() -> None:
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    cut = rotary_pos_embedding.get_pos_emb_on_this_cp_rank
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda emb, seq_dim, cp_group: cut(
        emb + 1e-6 * cp_group.rank(), seq_dim, cp_group
    )


def norms_compute_in_float32() -> None:
    """As a fast path may: the numbers are right to 1e-7, and blunt every proof."""
    import torch

    from equilibrium_mcore.models.norms import RMSNorm

    def broken(self, x):
        return torch.nn.functional.rms_norm(
            x.to(torch.float32), self.normalized_shape, self.weight.to(torch.float32), self.eps
        ).to(x.dtype)

    RMSNorm.forward = broken


def expert_bias_follows_the_tokens_of_one_data_rank() -> None:
    import importlib

    import torch

    # The package gives the function of the module's name.
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")

    def broken(tokens_per_expert, expert_bias, rate, tp_dp_cp_group=None):
        average = tokens_per_expert.mean(dim=-1, keepdim=True)
        return expert_bias + torch.sign(average - tokens_per_expert) * rate

    finalize.get_updated_expert_bias = broken


def global_balancing_divided_by_the_data_ranks_twice() -> None:
    """What megatron-core 0.19.2 does by itself."""
    from equilibrium_mcore.models.router import GlobalRouter

    del GlobalRouter.attach_and_log_load_balancing_loss


def recomputation_gives_other_numbers() -> None:
    """By 1e-7, as another seed or another order of sums would be small, but there."""
    from megatron.core.tensor_parallel import random

    forward = random.CheckpointFunction.forward

    def broken(ctx, run_function, *arguments):
        calls = []

        def other(*inputs):
            calls.append(None)
            hidden, *rest = run_function(*inputs)
            return (hidden if len(calls) == 1 else hidden * (1 + 1e-7), *rest)

        return forward(ctx, other, *arguments)

    random.CheckpointFunction.forward = staticmethod(broken)
