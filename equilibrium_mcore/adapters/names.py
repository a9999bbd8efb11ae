"""What adapters are called beside their layers: for what reads them without a model."""

from __future__ import annotations

ADAPTER = "adapter"  # the submodule of a linear layer
WEIGHT = ".weight"  # what a layer's name ends with to be its weight's
EXPERT = ".experts.local_experts."
