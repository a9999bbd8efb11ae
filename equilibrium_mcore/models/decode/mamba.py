"""Mamba-2 while decoding: a window of the convolution and the state of the recurrence.

Source: arXiv 2405.21060, section 6; `megatron.core.ssm.mamba_mixer` for the order of channels.

Shapes, of this TP rank: T tokens, R rows, L tokens of the longest, C convolved channels, K taps,
H heads, P channels per head, G groups, N state size, J = H / G heads per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equilibrium_mcore.models.decode.linear import output_of
from equilibrium_mcore.models.decode.state import Decodes, DecodeState, Prefill
from equilibrium_mcore.models.ssd import causal_conv, ssd_scan_with_state


class DecodingMamba(Decodes):
    """megatron-core's MambaMixer, whichever kernels it trains with, decoding in PyTorch."""

    def decode(
        self, hidden_states: Tensor, state: DecodeState, *, rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens / SP, 1, hidden) -> the same shape, and no bias."""
        zxBCdt = output_of(self.in_proj, hidden_states)
        maps = self.ngroups_local_tp * self.d_state
        widths = [self.d_inner_local_tp, self.d_inner_local_tp + 2 * maps, self.nheads_local_tp]
        z, xBC, dt = zxBCdt.squeeze(1).split(widths, dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        kept = state.memory(
            self,
            {
                "window": ((self.d_conv - 1, xBC.shape[-1]), xBC.dtype),
                "state": ((self.nheads_local_tp, self.headdim, self.d_state), wide),
            },
        )
        mix = self._prompts if isinstance(state.work, Prefill) else self._step
        y = mix(xBC, dt, kept, state.work)
        y = (y * F.silu(z)).unsqueeze(1)
        return output_of(self.out_proj, self.norm(y)), None

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N)."""
        maps = self.ngroups_local_tp * self.d_state
        x, B, C = F.silu(xBC).split([self.d_inner_local_tp, maps, maps], dim=-1)
        B, C = (t.unflatten(-1, (-1, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (-1, self.headdim)), B, C

    def _decay(self, dtype: torch.dtype) -> Tensor:
        return -torch.exp(self.A_log.to(dtype))

    def _prompts(
        self, xBC_TC: Tensor, dt_TH: Tensor, kept: dict[str, Tensor], work: Prefill
    ) -> Tensor:
        """Whole prompts, each from a state of zero, side by side: (T, channels).

        After the end of a row the step size is 0: the state stays what the last token made of it.
        """
        xBC_RLC = work.unpack(xBC_TC)
        taps = self.conv1d_weight.shape[-1]
        # The window: inputs of the last K - 1 tokens, zeros before the first.
        last = work.lengths.unsqueeze(1) - torch.arange(taps - 1, 0, -1, device=xBC_TC.device)
        window = xBC_RLC.gather(1, last.clamp(min=0).unsqueeze(-1).expand(-1, -1, xBC_TC.shape[-1]))
        kept["window"][work.rows] = window * (last >= 0).unsqueeze(-1)
        x, B, C = self._split(causal_conv(xBC_RLC, self.conv1d_weight.squeeze(1), self.conv1d_bias))
        y, final_RHPN = ssd_scan_with_state(
            x,
            work.unpack(dt_TH) * work.valid.unsqueeze(-1),
            self._decay(dt_TH.dtype),
            B,
            C,
            chunk_size=self.chunk_size,
            D_H=self.D,
        )
        kept["state"][work.rows] = final_RHPN
        return work.pack(y).flatten(-2)

    def _step(self, xBC_RC: Tensor, dt_RH: Tensor, kept: dict[str, Tensor], work: object) -> Tensor:
        """One more token of every row: (R, channels)."""
        window_RKC = torch.cat([kept["window"], xBC_RC.unsqueeze(1)], dim=1)
        kept["window"] = window_RKC[:, 1:]
        weight_KC = self.conv1d_weight.squeeze(1).t()
        x_RHP, B_RGN, C_RGN = self._split((window_RKC * weight_KC).sum(1) + self.conv1d_bias)
        state_RHPN, wide = kept["state"], kept["state"].dtype
        x_RHP, B_RGN, C_RGN = (t.to(wide) for t in (x_RHP, B_RGN, C_RGN))
        decay_RH = torch.exp(dt_RH * self._decay(wide))
        state_RGKN = state_RHPN.view(len(x_RHP), B_RGN.shape[1], -1, self.d_state)  # K = J P
        added_RGK = (x_RHP * dt_RH.unsqueeze(-1)).view(*state_RGKN.shape[:3])
        state_RHPN.mul_(decay_RH.unsqueeze(-1).unsqueeze(-1))
        state_RGKN.addcmul_(added_RGK.unsqueeze(-1), B_RGN.unsqueeze(2))
        y_RHP = (state_RGKN @ C_RGN.unsqueeze(-1)).view_as(x_RHP)
        y_RHP = y_RHP + x_RHP * self.D.to(wide).unsqueeze(-1)
        return y_RHP.to(xBC_RC.dtype).flatten(-2)
