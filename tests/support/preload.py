"""Imported once by the server that forks test ranks, so that no rank imports torch again."""

from equilibrium_mcore.parallel import accelerator

accelerator.install()
accelerator.quiet_libraries()

import equilibrium_mcore.training.callbacks  # noqa: E402
import equilibrium_mcore.training.loop  # noqa: E402, F401
