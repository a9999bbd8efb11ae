"""A scalar head: one number per token, from the normed hidden states of the last layer.

A reward model reads it at the last token of an answer, a critic at every token. Its weight is whole
on every tensor rank of the last pipeline stage, and drawn from the run's seed and its name, so that
it is the same in every layout. Under sequence parallelism each rank multiplies its part of the
sequence, and megatron-core sums the partial gradients of the weight.

Shapes: B sequences, S positions, H hidden size, C and T context and tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from equilibrium_mcore.models.draw import named_generator

SCALAR_HEAD = "scalar_head"  # the submodule of a model
SCALAR_HEAD_WEIGHT = f"{SCALAR_HEAD}.weight"


class ScalarHead(torch.nn.Module):
    """hidden -> 1, without a bias.

    Args:
        config: of the model.
        tp_group: ranks that share a sequence under sequence parallelism.
        seed: of the run.
    """

    def __init__(self, config: TransformerConfig, tp_group: Any, *, seed: int) -> None:
        super().__init__()
        self._sequence = config.sequence_parallel and tp_group.size() > 1
        self._group = tp_group
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size))
        drawn = torch.empty(1, config.hidden_size, dtype=torch.float64, device="cpu")
        drawn.normal_(std=config.init_method_std, generator=named_generator(seed, SCALAR_HEAD))
        with torch.no_grad():
            self.weight.copy_(drawn)
        self.weight.sequence_parallel = config.sequence_parallel  # for finalize_model_grads

    def forward(self, hidden: Tensor) -> Tensor:
        """(S / C, B, 1), the same on every tensor rank; in float32, or the model's dtype if wider.

        hidden: (S / C, B, H), of which each tensor rank has S / C / T under sequence parallelism.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = linear(hidden.to(wide), self.weight.to(wide))
        if self._sequence:
            # What follows is the same on every tensor rank, and so is its gradient: each takes its
            # part of it, and nothing is summed.
            values = gather_from_sequence_parallel_region(values, False, group=self._group)
        return values


class ScalarHeadModel(HybridModel):
    """A HybridModel with a scalar head on its last stage, in place of its output layer or beside.

    The last stage gives values, (B, S / C), whether it is given labels or not. With
    `keeps_output` it gives logits without labels, as a HybridModel, and with labels losses and
    values, (2, B, S / C), since megatron-core's schedule takes one tensor. Other stages give hidden
    states.
    """

    def __init__(self, *, keeps_output: bool, seed: int, **settings: Any) -> None:
        tied = settings.pop("share_embeddings_and_output_weights")
        super().__init__(share_embeddings_and_output_weights=tied and keeps_output, **settings)
        self.keeps_output = keeps_output
        self._hidden: Tensor | None = None
        if not self.post_process:
            return
        self.scalar_head = ScalarHead(self.config, self.pg_collection.tp, seed=seed)
        if keeps_output:
            self.output_layer.register_forward_pre_hook(self._note_hidden)
        else:
            del self.output_layer
            self.output_layer = self._project  # no module: what the parent's forward calls

    def forward(self, *args: Any, labels: Tensor | None = None, **settings: Any) -> Tensor:
        """See the class, and HybridModel for the arguments."""
        if not self.post_process:
            return super().forward(*args, labels=labels, **settings)
        if not self.keeps_output:
            return super().forward(*args, **settings).squeeze(-1)
        output = super().forward(*args, labels=labels, **settings)
        hidden, self._hidden = self._hidden, None
        if labels is None:
            return output
        values = self.scalar_head(hidden).squeeze(-1).transpose(0, 1)
        return torch.stack([output.to(values.dtype), values])

    def sharded_state_dict(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """As HybridModel's, which expects an output layer on a last stage."""
        is_last = self.post_process
        self.post_process = is_last and self.keeps_output
        try:
            return super().sharded_state_dict(*args, **settings)
        finally:
            self.post_process = is_last

    def _project(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.scalar_head(hidden), None

    def _note_hidden(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden = arguments[0]


def values_of(output: Tensor) -> Tensor:
    """(B, S / C), the values in what a `ScalarHeadModel` gives for a batch with labels."""
    return output[1] if output.dim() == 3 else output
