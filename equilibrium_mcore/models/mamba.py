"""megatron-core's Mamba-2 mixer with its scan in plain PyTorch, for hosts without mamba-ssm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor

from equilibrium_mcore.models.decode.mamba import DecodingMamba
from equilibrium_mcore.models.norms import GroupRMSNorm
from equilibrium_mcore.models.packing import TorchMambaContextParallel
from equilibrium_mcore.models.ssd import causal_conv, ssd_scan

_SUPPLIED = {
    "HAVE_MAMBA_SSM": True,
    "ExtendedRMSNorm": GroupRMSNorm,
    "MambaContextParallel": TorchMambaContextParallel,
}


@contextlib.contextmanager
def _parts_supplied() -> Iterator[None]:
    """Let MambaMixer be built without mamba-ssm and Transformer Engine, which it asks by name."""
    before = {name: getattr(mamba_mixer, name) for name in _SUPPLIED}
    try:
        vars(mamba_mixer).update(_SUPPLIED)
        yield
    finally:
        vars(mamba_mixer).update(before)


class TorchMambaMixer(DecodingMamba, MambaMixer):
    """MambaMixer whose convolution and scan run in PyTorch: same parameters, same function.

    Input and output have shape (sequence / SP, batch, hidden). TP splits heads and groups; CP
    gathers the sequence and splits heads once more (`MambaContextParallel`).
    """

    def __init__(self, *args, **kwargs) -> None:
        with _parts_supplied():
            super().__init__(*args, **kwargs)

    def _ssm_training(
        self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """The mixer between its projections. zxBCdt: (sequence, batch, channels of this rank)."""
        seq_idx = _documents_of(packed_seq_params)
        cp = self.cp
        state_channels = cp.ngroups_local_tpcp * self.d_state
        conv_channels = cp.d_inner_local_tpcp + 2 * state_channels
        z, xBC, dt = zxBCdt.transpose(0, 1).split(
            [cp.d_inner_local_tpcp, conv_channels, cp.nheads_local_tpcp], dim=-1
        )
        xBC = F.silu(
            causal_conv(
                xBC, cp.get_conv1d_weight().squeeze(1), cp.get_conv1d_bias(), seq_idx_BL=seq_idx
            )
        )
        x, B, C = xBC.split([cp.d_inner_local_tpcp, state_channels, state_channels], dim=-1)
        # float32 at least, float64 where the model is.
        wide = torch.promote_types(dt.dtype, torch.float32)
        y = ssd_scan(
            x.unflatten(-1, (-1, self.headdim)),
            F.softplus(dt.to(wide) + cp.get_dt_bias().to(wide)),
            -torch.exp(cp.get_A_log().to(wide)),
            B.unflatten(-1, (-1, self.d_state)),
            C.unflatten(-1, (-1, self.d_state)),
            chunk_size=self.chunk_size,
            D_H=cp.get_D(),
            seq_idx_BL=seq_idx,
        ).flatten(-2)
        y = (y * F.silu(z)).transpose(0, 1).contiguous()
        return self.norm(cp.post_conv_ssm(y, packed_seq_params))


class FusedMambaMixer(DecodingMamba, MambaMixer):
    """megatron-core's MambaMixer with mamba-ssm's kernels in training."""


def _documents_of(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """The document of each token, (batch, sequence). Packing without it would leak state."""
    if packed_seq_params is None:
        return None
    if packed_seq_params.seq_idx is None:
        raise ValueError(
            "packed_seq_params.seq_idx is None, so SSM state would leak from one packed document "
            "into the next: build PackedSeqParams with total_tokens set"
        )
    return packed_seq_params.seq_idx
