"""What the layers of a model remember of rows that are being continued.

A `DecodeState` travels through megatron-core as the `inference_context` of a forward pass. Every
layer that mixes positions keeps its share under its own number, so the chunks of a pipeline rank
need one state between them. Other layers see a packed sequence like any other: a pack of whole
prompts (`Prefill`), or one token per row (`Step`).

Under context parallelism no sequence is cut here: a context rank has rows of its own, and layers
take its whole parameters, which are replicated over context ranks.

Shapes: T tokens of a pack, R rows, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Prefill:
    """A pack of whole prompts of rows `first` and on, one after the other; the rest pads it.

    Attributes:
        lengths: [R], of each row, at least 1.
        places: [R, L], where in the pack the tokens of a row stand; 0 after its end.
        valid: [R, L], False there.
        sources: [T], the way back, an index of the flattened (R, L); 0 for what pads the pack.
        positions: [T], of each token in its row; 0 for what pads the pack.
    """

    first: int
    lengths: Tensor
    places: Tensor
    valid: Tensor
    sources: Tensor
    positions: Tensor

    @property
    def rows(self) -> slice:
        """The rows of the state."""
        return slice(self.first, self.first + len(self.lengths))

    def unpack(self, x_T: Tensor) -> Tensor:
        """(T, ...) -> (R, L, ...); after the end of a row stands some token of the pack."""
        return x_T[self.places]

    def pack(self, x_RL: Tensor) -> Tensor:
        """(R, L, ...) -> (T, ...); what pads the pack becomes some finite token of it."""
        return x_RL.flatten(0, 1)[self.sources]


def prefill(lengths: Sequence[int], *, first: int, tokens: int, device: torch.device) -> Prefill:
    """The pack of `tokens` that begins with rows of these lengths, at least one."""
    of_rows = torch.tensor(list(lengths), dtype=torch.long)
    longest = int(of_rows.max())
    column = torch.arange(longest)
    valid = column < of_rows.unsqueeze(1)
    starts = of_rows.cumsum(0) - of_rows
    places = torch.where(valid, starts.unsqueeze(1) + column, 0)
    sources, positions = (torch.zeros(tokens, dtype=torch.long) for _ in range(2))
    flat = torch.arange(valid.numel()).view_as(places)
    sources[places[valid]] = flat[valid]
    positions[places[valid]] = column.expand_as(valid)[valid]
    parts = of_rows, places, valid, sources, positions
    return Prefill(first, *(part.to(device) for part in parts))


@dataclass(frozen=True)
class Step:
    """One token of every row: `positions` [R], its place in the row; `longest`, past the last."""

    positions: Tensor
    longest: int

    def seen(self) -> Tensor:
        """(R, longest), True where the row has a token, the present one among them."""
        column = torch.arange(self.longest, device=self.positions.device)
        return column <= self.positions.unsqueeze(1)


@dataclass
class DecodeState:
    """Of `rows` rows of at most `capacity` tokens: what each layer remembers, by its number.

    Every tensor of `layers` has the rows first. `work` is set for each forward pass. `fixed` holds
    what layers derive from their weights, which must not change while the state is used.
    """

    rows: int
    capacity: int
    work: Prefill | Step | None = None
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    fixed: dict[Any, Any] = field(default_factory=dict)

    def memory(self, layer: Any, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict:
        """The layer's tensors [rows, ...], zeros at first, of these shapes and dtypes."""
        kept = self.layers.get(layer.layer_number)
        if kept is None:
            device = next(layer.parameters()).device
            kept = {
                name: torch.zeros(self.rows, *shape, dtype=dtype, device=device)
                for name, (shape, dtype) in shapes.items()
            }
            self.layers[layer.layer_number] = kept
        return kept

    def once[T](self, owner: object, make: Callable[[], T]) -> T:
        """What `make` gave for this owner, which is called the first time."""
        if owner not in self.fixed:
            self.fixed[owner] = make()
        return self.fixed[owner]

    def take(self, rows: Tensor) -> None:
        """Keep these rows, in this order; one may be kept several times."""
        self.rows = len(rows)
        for kept in self.layers.values():
            for name, value in kept.items():
                kept[name] = value.index_select(0, rows.to(value.device))

    def packed(self) -> PackedSeqParams:
        """For megatron-core: packed, and tables of positions reach to the capacity."""
        return PackedSeqParams(
            qkv_format="thd", max_seqlen_q=self.capacity, max_seqlen_kv=self.capacity
        )

    # What megatron-core asks of an inference context outside of its own attention and Mamba.

    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return isinstance(self.work, Step)

    def using_cuda_graph_this_step(self) -> bool:
        return False


class Decodes:
    """A layer of megatron-core that decodes, beside what it does in training.

    Stands before its class in the order of bases. `decode` is given the input as the layer has it
    in training, (tokens / SP, 1, hidden), with the state and `rotary_pos_emb`, and returns output
    and bias as that does.
    """

    decode: Callable[..., tuple[Tensor, Tensor | None]]

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The layer's forward pass; with a `DecodeState` as `inference_context`, `decode`."""
        state = named.get("inference_context")
        if isinstance(state, DecodeState):
            return self.decode(hidden_states, state, rotary_pos_emb=named.get("rotary_pos_emb"))
        return super().forward(hidden_states, *arguments, **named)
