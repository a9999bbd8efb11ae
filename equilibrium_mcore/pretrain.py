"""An alias of `equilibrium_mcore.train`: `python -m equilibrium_mcore.pretrain RUN.yaml`."""

from __future__ import annotations

import sys

from equilibrium_mcore.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
