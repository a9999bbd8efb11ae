"""A plain training loop over the exported class of transformers: what the witness does.

Nothing here is Megatron's or this project's training code: transformers' blocks, torch's loss, clip
and AdamW, one process, one batch at a time, all in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equilibrium_mcore.config.objectives import ObjectiveConfig
from equilibrium_mcore.config.optimizers import AdamWConfig, OptimizerConfig

# What a parameter of the exported class is, by the end of its name; the first row that fits.
KINDS = (
    (r"embed_tokens\.weight", "embedding"),
    (r"lm_head\.weight", "output"),
    (r"\.(A_log|D|dt_bias)", "ssm"),
    (r"\.conv1d\.(weight|bias)", "conv"),
    (r"norm\.weight", "norm"),
    (r"\.gate\.weight", "router"),
    (r"\.bias", "bias"),
    (r"", "matrix"),
)
DECAYED = ("embedding", "output", "router", "matrix")


@dataclass
class PlainTrace:
    """What the plain loop saw, by Hugging Face names."""

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, before clipping
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last step


class KeepFloat64(TorchFunctionMode):
    """Inside, code that asks for float32 by name (norms, softmax, logits) gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


def train_plainly(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    bias_update_rate: float | None,
) -> PlainTrace:
    """Train `model`, a float64 EquilibriumForCausalLM, one step per batch.

    batches: tokens, labels and loss_mask, each (sequences, tokens), a sequence being one document.
    The loss that is noted is the mean over the tokens that count; `objective` says what is
    minimised. `bias_update_rate` moves the experts' biases after each step; None: there are
    none.
    """
    adamw = optimizer.adamw
    update = torch.optim.AdamW(
        parameter_groups(model, adamw), betas=(adamw.beta1, adamw.beta2), eps=adamw.epsilon
    )
    routed = _count_routed(model)
    trace = PlainTrace()
    model.train()
    for batch in batches:
        update.zero_grad()
        with KeepFloat64():
            losses = losses_per_token(model, batch)
        mask = batch["loss_mask"].double()
        loss = (losses * mask).sum() / mask.sum()
        minimised(losses, mask, objective).backward()
        if not trace.gradients:
            trace.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        limit = optimizer.clip_gradient_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        update.step()
        if bias_update_rate is not None:
            _move_biases(routed, bias_update_rate)
        trace.loss.append(loss.item())
        trace.gradient_norm.append(norm.item())
    trace.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return trace


def losses_per_token(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every label in nats, (sequences, tokens)."""
    logits = model(batch["tokens"], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses.view_as(batch["labels"])


def minimised(losses: Tensor, mask: Tensor, objective: ObjectiveConfig) -> Tensor:
    """What gradients are taken of. Both (sequences, tokens)."""
    reduction = getattr(objective, "reduction", "token_mean")
    if reduction == "token_mean":
        return (losses * mask).sum() / mask.sum()
    counted = []
    for row, kept in zip(losses, mask, strict=True):
        if kept.any():
            tokens = kept.sum() if reduction == "sequence_mean" else objective.constant_length
            counted.append((row * kept).sum() / tokens)
    return torch.stack(counted).mean()


def parameter_groups(model: torch.nn.Module, adamw: AdamWConfig) -> list[dict]:
    """One group per parameter, with the rate and the decay of its kind."""
    groups = []
    for name, parameter in model.named_parameters():
        kind = next(kind for pattern, kind in KINDS if re.search(pattern + "$", name))
        groups.append(
            {
                "params": [parameter],
                "lr": adamw.learning_rates.get(kind, adamw.learning_rate),
                "weight_decay": adamw.weight_decay if kind in DECAYED else 0.0,
            }
        )
    return groups


def _count_routed(model: torch.nn.Module) -> dict[torch.nn.Module, Tensor]:
    """Tokens that went to each expert of every router since they were last reset, kept by hooks."""
    routed: dict[torch.nn.Module, Tensor] = {}

    def count(router: torch.nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        routed[router] += output[2].flatten().bincount(minlength=len(routed[router]))

    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            routed[module] = torch.zeros_like(module.e_score_correction_bias, dtype=torch.int64)
            module.register_forward_hook(count)
    return routed


def _move_biases(routed: dict[torch.nn.Module, Tensor], rate: float) -> None:
    """Down by `rate` where an expert had more than its share (arXiv 2412.19437, 2.1.2)."""
    for router, counts in routed.items():
        share = counts.double().mean()
        router.e_score_correction_bias.add_(rate * torch.sign(share - counts))
        counts.zero_()
