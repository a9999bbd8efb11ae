"""The optimizer of a run, by the table, layer-wise distributed over data ranks.

megatron-core's DDP reduces gradients to every rank; each parameter's owner updates its main weight
and shares the result. State is saved under the parameter's own sharding, so a checkpoint loads in
any layout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from equilibrium_mcore.config.optimizers import REST
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.optim.build import BUILDS, build_optimizers
from equilibrium_mcore.optim.exchange import share_updates
from equilibrium_mcore.optim.matrix import MatrixOptimizer
from equilibrium_mcore.optim.ownership import assign_owners
from equilibrium_mcore.optim.parameters import Parameter, describe_parameters
from equilibrium_mcore.optim.replicas import check_replicas
from equilibrium_mcore.optim.schedule import learning_rate_factor
from equilibrium_mcore.optim.schedule_free import ScheduleFree
from equilibrium_mcore.optim.update_limit import UpdateLimit


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports."""

    gradient_norm: float  # before clipping, over all parameters of the model
    skipped: bool  # nothing was updated: refused, or fp16 gradients overflowed


class HybridOptimizer:
    """Updates the parameters of this rank's model chunks.

    Args:
        chunks: megatron-core DDP-wrapped model chunks (one per virtual stage).
        groups: all process groups.
        config: the run.
        main_dtype: of main weights and state, unless the model is wider; float64 sharpens proofs of
            layout invariance.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        groups: ProcessGroupCollection,
        config: RunConfig,
        *,
        main_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.settings = config.optimizer
        self.parameters = describe_parameters(
            chunks, groups, model=config.model, optimizer=config.optimizer
        )
        self.device = next(chunks[0].parameters()).device
        assign_owners(self.parameters, distributed=config.parallelism.distributed_optimizer)
        self._owned = [p for p in self.parameters if self._keeps(p)]
        averages = self.settings.schedule_free is not None
        for parameter in self._owned:
            parameter.main = _main_weight(parameter.model, main_dtype, always_copy=averages)
        self.schedule_free: ScheduleFree | None = None
        if averages:
            self.schedule_free = ScheduleFree(self._owned, self.settings.schedule_free)
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
        built = build_optimizers(self._owned, self.settings)
        for optimizer in built if self.schedule_free is not None else ():
            for group in optimizer.param_groups:  # decay is the average's business: see `step`
                group["outer_weight_decay"], group["weight_decay"] = group["weight_decay"], 0.0
        return built

    # ------------------------------------------------------------------------------ stepping

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the fp16 loss scale; unchanged in other precisions."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the next step: `matrix` and `adamw`.

        Of a run with adapters, which no matrix trains beside, `matrix` is the adapters' rate.
        """
        factor = learning_rate_factor(
            self.settings.schedule, step=self.steps_done, total_steps=self.config.training.steps
        )
        matrix = getattr(self.settings, self.settings.matrices).learning_rate
        rest = getattr(self.settings, REST).learning_rate
        if self.config.adapters is not None:
            matrix = self.settings.adamw.learning_rates.get("adapter", rest)
        return {"matrix": matrix * factor, REST: rest * factor}

    @torch.no_grad()
    def step(self, *, refuses: Callable[[float], bool] | None = None) -> StepResult:
        """Clip, update, share. Gradients must be reduced and finalised. Collective.

        `refuses` is asked with the gradient norm before anything is updated; where it says yes,
        nothing is. Without it a norm that is not finite raises FloatingPointError.
        """
        if self.config.training.compare_replicas:
            check_replicas(
                self.parameters,
                owned=self._owned,
                weights_of=self._training_weights,
                step=self.steps_done + 1,
            )
        norm = self.gradient_norm()
        if self.scaler is not None:
            norm = norm / self.scaler.scale.item()
            overflow = not math.isfinite(norm)
            inverse = self.scaler.inv_scale
            self.scaler.update(overflow)
            if overflow:
                return StepResult(gradient_norm=norm, skipped=True)
        elif refuses is None and not math.isfinite(norm):
            raise FloatingPointError(self._name_non_finite())
        if refuses is not None and refuses(norm):
            return StepResult(gradient_norm=norm, skipped=True)
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
            if self.schedule_free is not None:
                self.schedule_free.decay(optimizer.param_groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.schedule_free is not None:
            self.schedule_free.update_average(rate)
        limit = None
        # A schedule-free average may move by any part of its distance from the fast weights.
        if self.config.training.compare_replicas and self.schedule_free is None:
            limit = UpdateLimit(self.settings, rate=rate, step=self.steps_done + 1)
        self._write(self._training_weights, limit)
        self.steps_done += 1
        return StepResult(gradient_norm=norm, skipped=False)

    def gradient_norm(self) -> float:
        """Global 2-norm of the reduced gradients, each element counted once. Collective."""
        squares = [
            torch.linalg.vector_norm(p.gradient, dtype=torch.float64).square()
            for p in self.parameters
            if p.counts_in_norm and p.is_owned
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(self.device)
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

    # ------------------------------------------------------------------------------ the model

    @torch.no_grad()
    def write_training_weights(self) -> None:
        """Give every rank's model the weights at which the next gradient is taken. Collective."""
        self._write(self._training_weights)

    def _training_weights(self, parameter: Parameter) -> Tensor:
        if self.schedule_free is None:
            return parameter.main
        return self.schedule_free.training_weights(parameter)

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The model with the weights that are evaluated and saved, inside. Collective.

        Without schedule-free training these are the training weights, and nothing happens.
        """
        if self.schedule_free is None:
            yield
            return
        self._write(self.schedule_free.average)
        try:
            yield
        finally:
            self.write_training_weights()

    @torch.no_grad()
    def _write(
        self, weights_of: Callable[[Parameter], Tensor], limit: UpdateLimit | None = None
    ) -> None:
        for parameter in self._owned:
            weights = weights_of(parameter)
            if weights is parameter.model:
                continue
            if limit is not None:
                limit.see(parameter, parameter.model.data.view(-1), weights.view(-1))
            parameter.model.data.copy_(weights)
        if self.config.parallelism.distributed_optimizer:
            share_updates(self.parameters, see=limit.see_copy if limit is not None else None)
        if limit is not None:
            limit.check(self.device)

    @torch.no_grad()
    def refresh_main_weights(self) -> None:
        """Take the main weights from the model again, after weights were loaded into it."""
        for parameter in self._owned:
            if parameter.main is not parameter.model:
                parameter.main.copy_(parameter.model)
        if self.schedule_free is not None:
            self.schedule_free.restart()

    # --------------------------------------------------------------------------------- state

    def state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        """The tensors of parameter-like shape that its owner keeps."""
        tensors = {}
        if self.schedule_free is not None:  # `main` is what a release is made of
            tensors["main"] = self.schedule_free.average(parameter)
            tensors["fast"] = parameter.main
        elif parameter.main is not parameter.model:
            tensors["main"] = parameter.main
        names = BUILDS[parameter.treatment.optimizer].state
        for optimizer in self._optimizers:
            kept = optimizer.state.get(parameter.main, {})
            tensors |= {key: kept[key] for key in names if key in kept}
        return tensors

    def whole_state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        """The tensors of its whole parts, by `state.part`."""
        names = BUILDS[parameter.treatment.optimizer].whole_state
        return {
            f"{key}.{part}": values[key]
            for optimizer in self._optimizers
            if isinstance(optimizer, MatrixOptimizer) and parameter.main in optimizer.whole_state
            for part, values in zip(
                optimizer.part_names(parameter.main),
                optimizer.whole_state[parameter.main],
                strict=True,
            )
            for key in names
            if key in values
        }

    def set_steps(self, steps_done: int) -> None:
        """Go on as after so many steps."""
        self.steps_done = steps_done
        for optimizer in self._optimizers:
            optimizer.set_steps(steps_done)

    def init_state(self) -> None:
        """Make all state tensors without changing a weight, so that they can be saved or loaded."""
        for optimizer in self._optimizers:
            optimizer.init_state()


def _main_weight(model: Tensor, dtype: torch.dtype, *, always_copy: bool) -> Tensor:
    """The tensor that is updated: the parameter itself where it is wide enough, else a copy."""
    dtype = torch.promote_types(model.dtype, dtype)
    if model.dtype == dtype and not always_copy:
        return model
    return model.detach().to(dtype, copy=True).requires_grad_(True)
