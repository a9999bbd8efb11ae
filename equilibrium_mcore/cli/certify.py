"""Certify that a run learns the same numbers in its layout as on one rank, without a GPU.

The run is shrunk to a twin that keeps what a layout could get wrong, and trained on CPU ranks in
float64: the loss and the routing of every step, every gradient, every weight, and the state after a
save in one layout and a load in the other are compared, to a relative 1e-9. Float32 is looked at
too, and only warns.

    {prog} configs/runs/pretrain_3b.yaml
    {prog} configs/runs/pretrain_3b.yaml \\
        --layouts tp=2,cp=2,pp=2,ep=2 tp=4,ep=4 --json certificate.json --plot certificate.png

On a GPU host the layouts are certified on CPU ranks too, and a second tier compares what only a GPU
has: Transformer Engine, the Triton scan, fused attention and FP8 against PyTorch's reference, layer
by layer at the model's real widths.

    {prog} configs/runs/pretrain_3b.yaml --tier kernels

Layouts agree with one rank also where both are wrong in the same way. A witness from outside, the
exported class of transformers in a plain loop with torch.optim.AdamW, trains from the same weights
on the same batches:

    {prog} configs/runs/pretrain_3b.yaml --witness transformers

Exit status: 0 every layout passes, 1 one does not, 2 a config or a layout that cannot be, which is
told before anything is trained, 3 ranks failed or did not end within --time-limit: no verdict.
"""

from __future__ import annotations

import argparse
import os
import sys

from equilibrium_mcore.cli.command import FAILED, wrong_command_line
from equilibrium_mcore.files.paths import report_path

NO_VERDICT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, its layouts, what is compared, and how long it may take."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a run's YAML file")
    add("overrides", nargs="*", metavar="key=value", help="as for pretraining")
    layouts = "layouts beside the run's own"
    add("--layouts", nargs="+", default=[], metavar="tp=2,cp=2", help=layouts)
    add("--world-size", type=int, help="ranks of the real run, if not in the config")
    add("--json", type=report_path, metavar="OUT", help="write the result here")
    add("--plot", type=report_path, metavar="PNG", help="draw the result here")
    tiers = ("layouts", "kernels")
    add("--tier", choices=tiers, default="layouts", help="kernels needs a GPU")
    limit = "for the ranks of each phase; then each rank's stack is printed (default 20)"
    add("--time-limit", type=float, default=20.0, metavar="MINUTES", help=limit)
    witness = "also train the twin by a plain loop over transformers' class (--tier layouts)"
    add("--witness", choices=["transformers"], help=witness)


def run(options: argparse.Namespace) -> int:
    """Certify, print the table; the exit status."""
    kernels = options.tier == "kernels"
    if kernels and options.witness:
        raise wrong_command_line("--witness needs --tier layouts: the kernels' tier trains nothing")
    if options.plot and options.plot.suffix.lower() != ".png":
        raise wrong_command_line(f"--plot {options.plot} must end in .png")
    _install_device(kernels)
    from equilibrium_mcore.certify.certificate import certify_run, write_certificate
    from equilibrium_mcore.config.load import load_run
    from equilibrium_mcore.parallel.rank_job import RankError

    config = load_run(options.config, options.overrides, world_size=options.world_size)
    try:
        certificate = certify_run(
            config,
            tier=options.tier,
            layouts=options.layouts,
            world_size=options.world_size,
            time_limit_minutes=options.time_limit,
            witness=options.witness is not None,
            progress=lambda text: print(f"... {text}", flush=True),
        )
    except RankError as error:
        print(error, file=sys.stderr)
        return NO_VERDICT
    print(certificate.table())
    if options.json:
        write_certificate(certificate, options.json)
    if options.plot:
        from equilibrium_mcore.certify.picture import plot_certificate

        plot_certificate(certificate.as_dict(), options.plot)
    return 0 if certificate.passed else FAILED


def _install_device(kernels: bool) -> None:
    from equilibrium_mcore.parallel import accelerator

    if kernels and not accelerator.has_cuda():
        raise wrong_command_line(
            "--tier kernels: this host has no CUDA device; --tier layouts needs none"
        )
    if not kernels:  # one GPU is not several ranks
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    accelerator.install()  # before megatron-core is imported
    accelerator.quiet_libraries()
