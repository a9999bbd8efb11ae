"""An alias of `equilibrium_mcore.train`: `python -m equilibrium_mcore.pretrain RUN.yaml`."""

from __future__ import annotations

import sys

from equilibrium_mcore.train import main
from equilibrium_mcore.training.signals import take_signals_at_once

__all__ = ["main"]

if __name__ == "__main__":
    take_signals_at_once()
    sys.exit(main(sys.argv[1:]))
