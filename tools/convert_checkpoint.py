"""Turn a distributed checkpoint, saved by any layout, into a Hugging Face folder.

Example:
    python tools/convert_checkpoint.py --checkpoint output/quickstart --output output/quickstart-hf \\
        --dtype float32 --verify
Then: AutoModelForCausalLM.from_pretrained("output/quickstart-hf", trust_remote_code=True)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from equilibrium_mcore.export.convert import DTYPES, export_hugging_face
from equilibrium_mcore.export.verify import verify_export


def main() -> int:
    """Parse the command line, convert, verify, print a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True,
        help="a run's output directory (its latest checkpoint is taken), or a checkpoint folder")
    add("--output", type=Path, required=True, help="the folder to write")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (bfloat16)")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--verify", action="store_true", help="compare its logits with Megatron's afterwards")
    options = parser.parse_args()
    try:
        with tqdm(desc="converting", unit=" tensors") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = export_hugging_face(
                options.checkpoint, options.output,
                dtype=options.dtype, overwrite=options.overwrite, progress=show,
            )  # fmt: skip
        print(f"{report.checkpoint} -> {report.directory}: {report.parameters:,} parameters, "
              f"{report.bytes / 1e9:.3f} GB of {options.dtype} in {report.shards} file(s)")
        if options.verify:
            difference = verify_export(report.checkpoint, report.directory)
            print(f"verified: logits differ from Megatron's by at most {difference:.1e}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
