"""Muon on whole matrices: the update does not depend on the layout.

Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaling from arXiv 2502.16982.
The orthogonalisation is emerging-optimizers' Newton-Schulz. What is orthogonalised is a matrix that
acts as one linear map (`optim.table`), put together from all tensor-parallel slices.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from torch import Tensor

from equilibrium_mcore.config.schema import MuonConfig
from equilibrium_mcore.optim.parameters import Parameter

# Elements that are orthogonalised at once. All of a 3B model's experts in one batch would need more
# memory than its weights.
BATCH_ELEMENTS = 128 * 2**20


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay.

    Args:
        parameters: matrices that this rank owns; their `main` tensors are updated in place from
            `main.grad`. All tensor-parallel ranks of a matrix must step together.
    """

    def __init__(self, parameters: list[Parameter], config: MuonConfig) -> None:
        self.config = config
        self._info = {parameter.main: parameter for parameter in parameters}
        super().__init__([p.main for p in parameters], defaults={"lr": config.learning_rate})

    def init_state(self) -> None:
        """Make the state of every parameter, so that it can be saved or loaded."""
        for group in self.param_groups:
            for main in group["params"]:
                if "momentum" not in self.state[main]:
                    self.state[main]["momentum"] = torch.zeros_like(main)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every owned matrix."""
        self.init_state()
        config = self.config
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                directions = {}
                for main in batch:
                    momentum = self.state[main]["momentum"]
                    momentum.lerp_(main.grad, 1 - config.momentum)
                    directions[main] = (
                        main.grad.lerp(momentum, config.momentum) if config.nesterov else momentum
                    )
                updates = self._orthogonalise(directions)
                for main, update in updates.items():
                    main.mul_(1 - group["lr"] * config.weight_decay)
                    main.add_(update.to(main.dtype), alpha=-group["lr"])

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters of one shape together, up to BATCH_ELEMENTS of them (at least one parameter).

        Dense ones first: tensor-parallel ranks own the same dense parameters, but not always the
        same experts, and must gather in the same order.
        """
        by_shape: dict[tuple[bool, torch.Size], list[Tensor]] = defaultdict(list)
        for main in parameters:
            by_shape[self._info[main].is_expert, main.shape].append(main)
        for key in sorted(by_shape, key=lambda key: key[0]):
            members, count = by_shape[key], max(1, BATCH_ELEMENTS // key[1].numel())
            for start in range(0, len(members), count):
                yield members[start : start + count]

    def _orthogonalise(self, directions: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Scaled orthogonal factors of this rank's slices; matrices of one shape go in a batch."""
        parts = {}
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        for main, direction in directions.items():
            parts[main] = whole_parts(direction, self._info[main])
            for index, part in enumerate(parts[main]):
                by_shape[tuple(part.shape)].append((main, index))
        with _matmul_precision(self.config.matmul_precision):
            for shape, places in by_shape.items():
                stack = torch.stack([parts[main][index] for main, index in places]).float()
                orthogonal = newton_schulz(
                    stack,
                    self.config.newton_schulz_steps,
                    coefficient_type=self.config.coefficients,
                )
                scale = get_muon_scale_factor(*shape, mode=self.config.scale)
                orthogonal = orthogonal * (scale * self.config.extra_scale)
                for (main, index), matrix in zip(places, orthogonal, strict=True):
                    parts[main][index] = matrix
        return {main: local_slice(whole, self._info[main]) for main, whole in parts.items()}


def whole_parts(local: Tensor, parameter: Parameter) -> list[Tensor]:
    """The parts of the whole matrix, gathered over tensor-parallel ranks. Collective."""
    group, dim = parameter.tensor_group, parameter.partition_dim
    if dim is None:
        return _split_rows(local, parameter.parts)
    slices = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(slices, local.contiguous(), group=group)
    if dim == 0:  # every rank holds a share of each part, so parts are cut before they are joined
        cut = [_split_rows(piece, parameter.parts, group.size()) for piece in slices]
        return [torch.cat(pieces, dim=0) for pieces in zip(*cut, strict=True)]
    return _split_rows(torch.cat(slices, dim=dim), parameter.parts)


def local_slice(parts: list[Tensor], parameter: Parameter) -> Tensor:
    """The inverse of `whole_parts`: this rank's slice."""
    group, dim = parameter.tensor_group, parameter.partition_dim
    if dim == 0:
        parts = [part.chunk(group.size(), dim=0)[group.rank()] for part in parts]
        return _join_rows(parts, parameter.parts, group.size())
    whole = _join_rows(parts, parameter.parts)
    return whole if dim is None else whole.chunk(group.size(), dim=dim)[group.rank()]


def _split_rows(matrix: Tensor, parts, ways: int = 1) -> list[Tensor]:
    """Cut rows into parts; `parts` = (blocks, sizes) with the sizes repeated in every block."""
    if parts is None:
        return [matrix]
    blocks, sizes = parts
    if blocks == 1:
        return list(matrix.split([size // ways for size in sizes], dim=0))
    by_block = matrix.unflatten(0, (blocks // ways, sum(sizes)))
    return [part.flatten(0, 1) for part in by_block.split(sizes, dim=1)]


def _join_rows(pieces: list[Tensor], parts, ways: int = 1) -> Tensor:
    if parts is None or parts[0] == 1:
        return torch.cat(pieces, dim=0)
    blocks = parts[0] // ways
    return torch.cat([piece.unflatten(0, (blocks, -1)) for piece in pieces], dim=1).flatten(0, 1)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
