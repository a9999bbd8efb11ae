"""Turn a distributed checkpoint, saved by any layout, into a Hugging Face folder.

Example:
    {prog} --checkpoint runs/quickstart/run --output exported --verify
Then: AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.config.chat import BUILT_IN, template_named
from equilibrium_mcore.files.paths import user_path

DTYPES = ("float32", "bfloat16")  # of hugging_face.weights, which needs torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the folder, and what goes into it."""
    add = parser.add_argument
    where = "a run's output directory (its latest checkpoint is taken), or a checkpoint folder"
    add("--checkpoint", type=user_path, required=True, help=where)
    add("--output", type=user_path, required=True, help="the folder to write")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (bfloat16)")
    add("--main-weights", action="store_true", help="from the optimizer's float32 copies")
    adapters = "of a run that has some: added to the weights, or apart as peft loads them, or none"
    add("--adapters", choices=("merge", "apart", "leave_out"), default="merge", help=adapters)
    template = f"{', '.join(BUILT_IN)}, a Jinja FILE, or none (the run's, if it has conversations)"
    add("--chat-template", metavar="TEMPLATE", help=template)
    add("--overwrite", action="store_true", help="replace what it wrote there before")
    add("--verify", action="store_true", help="compare its logits with Megatron's afterwards")


def run(options: argparse.Namespace) -> None:
    """Convert, verify, print a summary."""
    from tqdm import tqdm

    from equilibrium_mcore.hugging_face.convert import export_hugging_face
    from equilibrium_mcore.hugging_face.verify import verify_export

    given = vars(options)
    verify, template = given.pop("verify"), given.pop("chat_template")
    checkpoint, output = given.pop("checkpoint"), given.pop("output")
    if template is not None:
        given["chat_template"] = template if template == "none" else template_named(template)
    with tqdm(desc="converting", unit=" tensors") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = export_hugging_face(checkpoint, output, progress=show, **given)
    weights = report.weights
    print(f"{report.checkpoint} -> {report.directory}: {weights.parameters:,} parameters")
    print(*report.notes, sep="\n", end="\n" if report.notes else "")
    print(f"{weights.bytes / 1e6:,.1f} MB of {weights.dtype} in {weights.files} file(s)")
    if verify:
        main = given["main_weights"]
        difference = verify_export(report.checkpoint, report.directory, main_weights=main)
        print(f"verified: logits differ from Megatron's by at most {difference:.1e}")
