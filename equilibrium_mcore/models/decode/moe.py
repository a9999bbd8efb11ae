"""Feed-forward layers on the few tokens of a step: products, and little between them.

Each function takes a layer of megatron-core and gives what it comes down to while its weights stand
still, or the layer itself where it does more than that: parts on other ranks, adapters, fused
kernels. Same products, sums and order as megatron-core's, so the same bits.

Shapes: T tokens, E experts, k of them for a token, H width of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from equilibrium_mcore.models.decode.linear import has_hooks, is_plain

FeedForward = Callable[[Tensor], tuple[Tensor, Tensor | None]]
LAYERS = ("linear_fc1", "linear_fc2")


def feed_forward(layer: torch.nn.Module) -> FeedForward:
    """(T / SP, 1, H) -> the same shape, and a bias or None: of an MLP or a layer of experts."""
    if isinstance(layer, MoELayer):
        return _experts_of_tokens(layer) if _is_whole(layer) else layer
    return mlp(layer)


def mlp(layer: torch.nn.Module) -> FeedForward:
    """Of an MLP, shared experts among them."""
    if not isinstance(layer, MLP) or has_hooks(layer) or not is_pair(layer):
        return layer
    if getattr(layer, "use_shared_expert_gate", False):
        return layer
    first, second = (layer._modules[name].weight.t() for name in LAYERS)
    activate = activation(layer)
    return lambda x: (torch.matmul(activate(torch.matmul(x, first)), second), None)


def is_pair(layer: MLP) -> bool:
    """Whether an MLP is two weights of this rank and an activation, and nothing beside them."""
    config = layer.config
    if config.fp8 or config.fp4 or config.bias_activation_fusion or config.use_te_activation_func:
        return False
    if config.glu_linear_offset or config.activation_func_clamp_value is not None:
        return False
    return all(is_plain(layer._modules[name]) for name in LAYERS)


def activation(layer: MLP | SequentialMLP) -> Callable[[Tensor], Tensor]:
    """What stands between the two products."""
    function = layer.config.activation_func
    if not layer.config.gated_linear_unit:
        return function

    def gated(x: Tensor) -> Tensor:
        gate, inner = x.chunk(2, dim=-1)
        return function(gate) * inner

    return gated


def products(x: Tensor, counts: list[int], weights: list[Tensor]) -> Tensor:
    """Tokens of each expert in turn, as many as `counts` says, times its weight [in, out]."""
    y = x.new_empty(x.shape[0], weights[0].shape[1])
    for count, tokens, result, weight in zip(
        counts, x.split(counts), y.split(counts), weights, strict=True
    ):
        if count:
            torch.mm(tokens, weight, out=result)
    return y


def _is_whole(layer: MoELayer) -> bool:
    """Whether all experts are this rank's, and nothing happens but what is done here."""
    config, experts = layer.config, layer.experts
    modules = (layer, layer.router, experts)
    return (
        isinstance(experts, SequentialMLP)
        and layer.ep_group.size() == 1
        and layer.attn_tp_group.size() == 1
        and not any(has_hooks(module) for module in modules)
        and all(is_pair(expert) and not has_hooks(expert) for expert in experts.local_experts)
        and _only_chooses(layer.router)
        and config.moe_expert_capacity_factor is None
        and not config.moe_apply_probs_on_input
        and not config.moe_latent_size
        and not config.moe_permute_fusion
        and not layer.shared_expert_overlap
    )


def _only_chooses(router: TopKRouter) -> bool:
    """Whether tokens go to the experts of their largest scores, whatever the others' are."""
    config = router.config
    return (
        router.routing_type not in ("sinkhorn", "quantile_balancing")
        and router.router_replay is None
        and config.moe_input_jitter_eps is None
        and not config.moe_router_force_load_balancing
        and config.moe_router_force_biased is None
        and not config.moe_router_fusion
    )


def _experts_of_tokens(layer: MoELayer) -> FeedForward:
    """A layer of experts which are all of this rank."""
    router, config = layer.router, layer.config
    experts = layer.experts.local_experts
    first, second = ([e._modules[name].weight.t() for e in experts] for name in LAYERS)
    activate = activation(layer.experts)
    shared = None if layer.shared_experts is None else mlp(layer.shared_experts)
    router._maintain_float32_expert_bias()

    def forward(x_T1H: Tensor) -> tuple[Tensor, None]:
        x_TH = x_T1H.flatten(0, 1)
        p_Tk, expert_Tk = topk_routing_with_score_function(
            router.gating(x_TH),
            router.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
            dense_output=True,
        )
        of_place = expert_Tk.flatten()
        order = of_place.argsort(stable=True)  # by expert, and of one expert by token
        token = order // router.topk
        counts = torch.bincount(of_place, minlength=len(experts)).tolist()
        inner = activate(products(x_TH.index_select(0, token), counts, first))
        inner = (inner * p_Tk.flatten().index_select(0, order).unsqueeze(1)).to(inner.dtype)
        y_TH = torch.zeros_like(x_TH).index_add_(0, token, products(inner, counts, second))
        y_T1H = y_TH.view_as(x_T1H)
        if shared is None:
            return y_T1H, None
        beside = shared(x_T1H)
        # megatron-core's shared experts give no bias beside their output.
        return y_T1H + (beside if isinstance(beside, Tensor) else beside[0]), None

    return forward
