"""Turn a distributed checkpoint, saved by any layout, into a Hugging Face folder.

Example:
    python tools/convert_checkpoint.py --checkpoint runs/quickstart/run --output exported --verify
Then: AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from equilibrium_mcore.config.chat import BUILT_IN, template_named
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.hugging_face.convert import export_hugging_face
from equilibrium_mcore.hugging_face.verify import verify_export
from equilibrium_mcore.hugging_face.weights import DTYPES


def main() -> int:
    """Parse the command line, convert, verify, print a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    where = "a run's output directory (its latest checkpoint is taken), or a checkpoint folder"
    add("--checkpoint", type=user_path, required=True, help=where)
    add("--output", type=user_path, required=True, help="the folder to write")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (bfloat16)")
    add("--main-weights", action="store_true", help="from the optimizer's float32 copies")
    template = f"{', '.join(BUILT_IN)}, a Jinja FILE, or none (the run's, if it has conversations)"
    add("--chat-template", metavar="TEMPLATE", help=template)
    add("--overwrite", action="store_true", help="replace what it wrote there before")
    add("--verify", action="store_true", help="compare its logits with Megatron's afterwards")
    options = vars(parser.parse_args())
    verify, template = options.pop("verify"), options.pop("chat_template")
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    if template is not None:
        options["chat_template"] = template if template == "none" else template_named(template)
    try:
        with tqdm(desc="converting", unit=" tensors") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = export_hugging_face(checkpoint, output, progress=show, **options)
        print(*report.notes, sep="\n", end="\n" if report.notes else "")
        weights = report.weights
        print(f"{report.checkpoint} -> {report.directory}: {weights.parameters:,} parameters")
        print(f"{weights.bytes / 1e6:,.1f} MB of {weights.dtype} in {weights.files} file(s)")
        if verify:
            main = options["main_weights"]
            difference = verify_export(report.checkpoint, report.directory, main_weights=main)
            print(f"verified: logits differ from Megatron's by at most {difference:.1e}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
