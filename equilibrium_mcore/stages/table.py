"""The stages by name: a new one is a file here, a row here, and one in `config/stages.py`."""

from __future__ import annotations

from collections.abc import Callable

from equilibrium_mcore.stages.distill import distill_rank
from equilibrium_mcore.stages.offline import train_rank
from equilibrium_mcore.stages.online import online_rank
from equilibrium_mcore.stages.preferences import preference_rank

# (place, config=) of every rank, from setup to the end.
STAGE_RANKS: dict[str, Callable[..., None]] = {
    "pretrain": train_rank,
    "midtrain": train_rank,
    "sft": train_rank,
    "lora": train_rank,
    "distill": distill_rank,
    "dpo": preference_rank,
    "ipo": preference_rank,
    "simpo": preference_rank,
    "orpo": preference_rank,
    "kto": preference_rank,
    "reward_model": train_rank,
    "rlaif": online_rank,
    "grpo": online_rank,
    "spo": online_rank,
    "ppo": online_rank,
    "opd": online_rank,
}
