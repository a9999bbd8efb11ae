"""Train what one file says: a run, or an experiment, of any stage.

Its command line is that of `python -m equilibrium_mcore.train`, which launchers call.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str], *, program: str) -> int:
    """Check the config, then run its stage in every rank; the exit status."""
    if {"-h", "--help"} & set(arguments):  # without what training imports
        from equilibrium_mcore.config.load import usage

        print(usage(program))
        return 0
    from equilibrium_mcore.train import main as train

    return train(list(arguments), program=program)
