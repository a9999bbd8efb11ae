"""The optimizer of a run: Muon and AdamW by the table, layer-wise distributed over data ranks.

megatron-core's DDP reduces gradients to every rank; each parameter's owner updates its main weight
and shares the result. State is saved under the parameter's own sharding, so a checkpoint loads in
any layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.optim.muon import Muon
from equilibrium_mcore.optim.ownership import assign_owners, share_updates
from equilibrium_mcore.optim.parameters import Parameter, describe_parameters
from equilibrium_mcore.optim.schedule import learning_rate_factor

# AdamW decays only tables whose scale nothing else holds.
DECAYED_KINDS = ("embedding", "output", "router", "matrix")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports."""

    gradient_norm: float  # before clipping, over all parameters of the model
    skipped: bool  # fp16 only: gradients overflowed, the loss scale was lowered instead


class HybridOptimizer:
    """Updates the parameters of this rank's model chunks.

    Args:
        chunks: megatron-core DDP-wrapped model chunks (one per virtual stage).
        groups: all process groups.
        config: the run.
    """

    def __init__(
        self, chunks: list[torch.nn.Module], groups: ProcessGroupCollection, config: RunConfig
    ) -> None:
        self.config = config
        self.settings = config.optimizer
        self.parameters = describe_parameters(
            chunks, groups, model=config.model, optimizer=config.optimizer
        )
        assign_owners(self.parameters, distributed=config.parallelism.distributed_optimizer)
        self._owned = [p for p in self.parameters if self._keeps(p)]
        for parameter in self._owned:
            parameter.main = _main_weight(parameter.model)
        self._optimizers = self._build_optimizers()
        self.scaler = None
        if config.training.precision == "fp16":
            self.scaler = DynamicGradScaler(
                initial_scale=2.0**16,
                min_scale=1.0,
                growth_factor=2.0,
                backoff_factor=0.5,
                growth_interval=1000,
                hysteresis=2,
            )
        self.steps_done = 0

    def _keeps(self, parameter: Parameter) -> bool:
        """Without the distributed optimizer every rank keeps, and updates, everything."""
        return parameter.is_owned or not self.config.parallelism.distributed_optimizer

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        built: list[torch.optim.Optimizer] = []
        matrices = [p for p in self._owned if p.is_matrix]
        if matrices:
            built.append(Muon(matrices, self.settings.muon))
        rest = [p for p in self._owned if not p.is_matrix]
        adamw = self.settings.adamw
        groups = []
        for kind in sorted({p.kind for p in rest}):
            rate = adamw.learning_rates.get(kind, adamw.learning_rate)
            groups.append(
                {
                    "params": [p.main for p in rest if p.kind == kind],
                    "lr": rate,
                    "weight_decay": adamw.weight_decay if kind in DECAYED_KINDS else 0.0,
                }
            )
        if groups:
            built.append(
                torch.optim.AdamW(groups, betas=(adamw.beta1, adamw.beta2), eps=adamw.epsilon)
            )
        for optimizer in built:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return built

    # ------------------------------------------------------------------------------ stepping

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the fp16 loss scale; unchanged in other precisions."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the next step: `matrix` (Muon's or AdamW's) and `adamw`."""
        factor = learning_rate_factor(
            self.settings.schedule, step=self.steps_done, total_steps=self.config.training.steps
        )
        adamw = self.settings.adamw.learning_rate
        matrix = adamw
        if self.settings.matrices == "muon":
            matrix = self.settings.muon.learning_rate
        return {"matrix": matrix * factor, "adamw": adamw * factor}

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip, update, share. Gradients must be reduced and finalised. Collective."""
        norm = self.gradient_norm()
        if self.scaler is not None:
            norm = norm / self.scaler.scale.item()
            overflow = not math.isfinite(norm)
            inverse = self.scaler.inv_scale
            self.scaler.update(overflow)
            if overflow:
                return StepResult(gradient_norm=norm, skipped=True)
        elif not math.isfinite(norm):
            raise FloatingPointError(self._name_non_finite())
        clip = self.settings.clip_gradient_norm
        factor = 1.0 if not clip or norm <= clip else clip / (norm + 1e-6)
        for parameter in self._owned:
            gradient = parameter.gradient.to(parameter.main.dtype)
            if self.scaler is not None:
                gradient = gradient * inverse
            # In place: the buffer is cleared before the next step, and a copy of all gradients
            # would be as large as the main weights.
            parameter.main.grad = gradient.mul_(factor) if factor != 1.0 else gradient
        rate = learning_rate_factor(
            self.settings.schedule, step=self.steps_done, total_steps=self.config.training.steps
        )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in self._owned:
            if parameter.main is not parameter.model:
                parameter.model.data.copy_(parameter.main)
        if self.config.parallelism.distributed_optimizer:
            share_updates(self.parameters)
        self.steps_done += 1
        return StepResult(gradient_norm=norm, skipped=False)

    def gradient_norm(self) -> float:
        """Global 2-norm of the reduced gradients, each element counted once. Collective."""
        squares = [
            torch.linalg.vector_norm(p.gradient, dtype=torch.float64).square()
            for p in self.parameters
            if p.counts_in_norm and p.is_owned
        ]
        device = self.parameters[0].model.device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(device)
        torch.distributed.all_reduce(total)
        return total.sqrt().item()

    def _name_non_finite(self) -> str:
        bad = [p.name for p in self.parameters if not p.gradient.isfinite().all()]
        where = f"first here: {bad[0]}" if bad else "none on this rank"
        return (
            f"step {self.steps_done + 1}: the gradient norm is not finite ({len(bad)} parameters "
            f"on this rank, {where}). Nothing was updated. Resume from the latest checkpoint with "
            "a lower learning rate or a longer warmup, or look at the data of this step"
        )

    # --------------------------------------------------------------------------------- state

    @torch.no_grad()
    def refresh_main_weights(self) -> None:
        """Take the main weights from the model again, after weights were loaded into it."""
        for parameter in self._owned:
            if parameter.main is not parameter.model:
                parameter.main.copy_(parameter.model)

    def sharded_state_dict(self, model_sharded: dict) -> dict:
        """State as megatron-core sharded tensors: `tensors` by name, and `common` plain values."""
        self._init_state()
        named = {id(p.model): p for p in self.parameters}
        by_id = get_param_id_to_sharded_param_map(model_sharded, [p.model for p in self.parameters])
        shards = {self.parameters[i].name: sharded for i, sharded in by_id.items()}
        tensors: dict[str, dict] = {}
        for parameter in self.parameters:
            if not parameter.is_owned:
                continue
            if parameter.name not in shards:
                raise KeyError(f"{parameter.name} has no place in the model's sharded state")
            shard = _written_by_owner(shards[parameter.name])
            tensors[parameter.name] = {
                key: make_sharded_optimizer_tensor(shard, value, prefix=f"optimizer.{key}")
                for key, value in self._state_of(parameter).items()
            }
        assert len(named) == len(self.parameters)
        return {"tensors": tensors, "common": self._common_state()}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `sharded_state_dict` described. Collective when not distributed."""
        with torch.no_grad():
            for parameter in self.parameters:
                if not parameter.is_owned:
                    continue
                for key, target in self._state_of(parameter).items():
                    target.copy_(state["tensors"][parameter.name][key])
        common = state["common"]
        self.steps_done = common["steps_done"]
        if self.scaler is not None and common.get("scaler"):
            self.scaler.load_state_dict(common["scaler"])
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for values in optimizer.state.values():
                    values["step"].fill_(common["adamw_steps"])
        if not self.config.parallelism.distributed_optimizer:
            self._share_state()

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        """The tensors of parameter-like shape that its owner keeps."""
        tensors = {}
        if parameter.main is not parameter.model:
            tensors["main"] = parameter.main
        for optimizer in self._optimizers:
            if parameter.main in optimizer.state:
                for key, value in optimizer.state[parameter.main].items():
                    if key != "step":
                        tensors[key] = value
        return tensors

    def _common_state(self) -> dict:
        # Skipped fp16 steps do not count, so AdamW's own counter equals steps_done.
        return {
            "steps_done": self.steps_done,
            "adamw_steps": self.steps_done,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    @torch.no_grad()
    def _init_state(self) -> None:
        """Make all state tensors without changing a weight, so that they can be saved or loaded."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, Muon):
                optimizer.init_state()
                continue
            for group in optimizer.param_groups:
                for main in group["params"]:
                    if not optimizer.state[main]:
                        optimizer.state[main] = {
                            "step": torch.tensor(float(self.steps_done)),
                            "exp_avg": torch.zeros_like(main),
                            "exp_avg_sq": torch.zeros_like(main),
                        }

    @torch.no_grad()
    def _share_state(self) -> None:
        """Without the distributed optimizer only rank 0 of a group reads; the rest get a copy."""
        for parameter in self.parameters:
            if parameter.data_group.size() > 1:
                for tensor in self._state_of(parameter).values():
                    source = torch.distributed.get_global_rank(
                        parameter.data_group, parameter.owner
                    )
                    torch.distributed.broadcast(tensor, source, group=parameter.data_group)


def _main_weight(model: Tensor) -> Tensor:
    """The tensor that is updated: the parameter itself where it is wide enough, else a copy."""
    if model.dtype in (torch.float32, torch.float64):
        return model
    return model.detach().float().clone().requires_grad_(True)


def _written_by_owner(shard):
    """The shard with its data-parallel replica number set to 0: its owner is what writes it."""
    replica = shard.replica_id
    return replace(shard, replica_id=0 if isinstance(replica, int) else (*replica[:-1], 0))
