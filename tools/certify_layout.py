"""Certify that a run learns the same numbers in its layout as on one rank, without a GPU.

The run is shrunk to a twin that keeps what a layout could get wrong, and trained on CPU ranks in
float64: the loss and the routing of every step, every gradient, every weight, and the state after a
save in one layout and a load in the other are compared, to a relative 1e-9. Float32 is looked at
too, and only warns.

    python tools/certify_layout.py configs/runs/pretrain_3b.yaml
    python tools/certify_layout.py configs/runs/pretrain_3b.yaml \\
        --layouts tp=2,cp=2,pp=2,ep=2 tp=4,ep=4 --json certificate.json --plot certificate.png

On a GPU host the layouts are certified on CPU ranks too, and a second tier compares what only a GPU
has: Transformer Engine, the Triton scan, fused attention and FP8 against PyTorch's reference, layer
by layer at the model's real widths.

    python tools/certify_layout.py configs/runs/pretrain_3b.yaml --tier kernels

Layouts agree with one rank also where both are wrong in the same way. A witness from outside, the
exported class of transformers in a plain loop with torch.optim.AdamW, trains from the same weights
on the same batches:

    python tools/certify_layout.py configs/runs/pretrain_3b.yaml --witness transformers

The exit status is 0 when every layout passes, 1 when one does not, 2 for a config or a layout that
cannot be, which is said before anything is trained, and 3 when ranks failed or did not end within
--time-limit, so that there is no verdict.
"""

from __future__ import annotations

import argparse
import os
import sys

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.files.paths import report_path
from equilibrium_mcore.parallel import accelerator


def main() -> int:
    """Parse the command line, certify, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for pretraining")
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="tp=2,cp=2", help="layouts beside the run's own"
    )
    parser.add_argument(
        "--world-size", type=int, help="ranks of the real run, if not in the config"
    )
    parser.add_argument("--json", type=report_path, metavar="OUT", help="write the result here")
    parser.add_argument("--plot", type=report_path, metavar="PNG", help="draw the result here")
    parser.add_argument(
        "--tier", choices=["layouts", "kernels"], default="layouts", help="kernels needs a GPU"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=20.0,
        metavar="MINUTES",
        help="for the ranks of each phase; then each rank's stack is printed (default 20)",
    )
    parser.add_argument(
        "--witness",
        choices=["transformers"],
        help="also train the twin by a plain loop over transformers' class (--tier layouts)",
    )
    options = parser.parse_args()
    if options.plot and options.plot.suffix.lower() != ".png":
        parser.error(f"--plot {options.plot} must end in .png")
    kernels = options.tier == "kernels"
    if kernels and not accelerator.has_cuda():
        parser.error("--tier kernels: this host has no CUDA device; --tier layouts needs none")
    if kernels and options.witness:
        parser.error("--witness needs --tier layouts: the kernels' tier trains nothing")
    if not kernels:  # one GPU is not several ranks
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    accelerator.install()  # before megatron-core is imported
    accelerator.quiet_libraries()
    from equilibrium_mcore.certify.certificate import certify_run, write_certificate
    from equilibrium_mcore.parallel.rank_job import RankError

    try:
        config = load_run(options.config, options.overrides, world_size=options.world_size)
        certificate = certify_run(
            config,
            tier=options.tier,
            layouts=options.layouts,
            world_size=options.world_size,
            time_limit_minutes=options.time_limit,
            witness=options.witness is not None,
            progress=lambda text: print(f"... {text}", flush=True),
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RankError as error:
        print(error, file=sys.stderr)
        return 3
    print(certificate.table())
    if options.json:
        write_certificate(certificate, options.json)
    if options.plot:
        from equilibrium_mcore.certify.picture import plot_certificate

        plot_certificate(certificate.as_dict(), options.plot)
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
