"""Continue a prompt with an exported model, on the CPU, with a cache.

    python examples/generate.py runs/quickstart/hugging_face --prompt "def read_lines(path):"

Loads the folder's own modelling code (trust_remote_code), so use it on folders that you made.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from equilibrium_mcore.files.paths import user_path


def generate(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> tuple[str, int]:
    """The continuation of `prompt` and its number of tokens; temperature 0 takes the likeliest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights: it would stand before the text
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.eval()
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, use_cache=True, **sampling)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    # The whole is decoded, and the prompt's part cut off: a piece at the border may begin a word.
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)
    start = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    return whole.removeprefix(start), len(new_ids)


def main() -> None:
    """Parse the command line, generate, print prompt and continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, help="written by tools/convert_checkpoint.py")
    parser.add_argument("--prompt", default="def read_lines(path):")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").is_file():
        sys.exit(
            f"error: {arguments.folder} holds no config.json: give the folder that "
            "tools/convert_checkpoint.py wrote"
        )
    started = time.monotonic()
    options = {k: v for k, v in vars(arguments).items() if k not in ("folder", "prompt")}
    continuation, count = generate(arguments.folder, arguments.prompt, **options)
    print(
        f"{arguments.prompt}\033[1m{continuation}\033[0m"
        if sys.stdout.isatty()
        else f"{arguments.prompt}{continuation}"
    )
    print(f"({count} tokens, {time.monotonic() - started:.1f} s with loading)", file=sys.stderr)


if __name__ == "__main__":
    main()
