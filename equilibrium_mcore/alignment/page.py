"""A page of pairs for a person: blind, one file, no server; and what was chosen on it.

    page.html       prompts with two answers each, in an order by a seed; it names no model
    page_key.json   which of them is AFTER's; not to be looked at before
    choices.json    what was chosen: saved by the page, or written by hand

Choices name the page that they were made on, and those of another page are refused.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equilibrium_mcore.alignment.judged import after_is_first, preferred
from equilibrium_mcore.alignment.rows import Row
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.whole import write_whole

PAGE, KEY, CHOICES = "page.html", "page_key.json", "choices.json"
ALLOWED = {"A": "first", "B": "second", "tie": "tie"}


def write_page(rows: Sequence[Row], folder: Path, *, seed: int) -> None:
    """Page, key, and a file of choices that is still to be filled, unless one is there."""
    flipped = [after_is_first(row, seed) for row in rows]
    pairs = [
        (row.prompt, *((row.after, row.before) if flip else (row.before, row.after)))
        for row, flip in zip(rows, flipped, strict=True)
    ]
    name = _name(pairs)
    write_whole(folder / PAGE, _page(pairs, name).encode())
    _write_json(folder / KEY, {"page": name, "after_is_first": flipped})
    if not (folder / CHOICES).exists():
        _write_json(folder / CHOICES, {"page": name, "choices": [None] * len(rows)})


def read_choices(rows: Sequence[Row], folder: Path, choices: Path) -> int:
    """Note what was chosen in the rows; how many pairs are still open, which stay unjudged.

    Raises ConfigError for choices of another page, and for what is no choice.
    """
    key, made = _read_json(folder / KEY), _read_json(choices)
    if made.get("page") != key["page"]:
        raise ConfigError(
            f"{choices}: choices of the page {made.get('page')!r}, and {folder / PAGE} is "
            f"{key['page']!r}: name the file that was saved on this page (--choices FILE)"
        )
    found = made.get("choices")
    if (
        not isinstance(found, list)
        or len(found) != len(rows)
        or len(rows) != len(key["after_is_first"])
    ):
        raise ConfigError(
            f"{choices}: `choices` must be a list with an entry for {len(rows)} pairs"
        )
    for number, choice in enumerate(found):
        if choice is not None and choice not in ALLOWED:
            raise ConfigError(
                f"{choices}: choice {number + 1} is {choice!r}: write "
                f"{', '.join(ALLOWED)}, or null where nothing was chosen"
            )
    for row, choice, flip in zip(rows, found, key["after_is_first"], strict=True):
        row.swayed = False
        row.preference = None if choice is None else preferred(ALLOWED[choice], after_first=flip)
    return found.count(None)


def _name(pairs: Sequence[tuple[str, str, str]]) -> str:
    return hashlib.blake2b(json.dumps(pairs).encode(), digest_size=8).hexdigest()


def _write_json(path: Path, values: Any) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is not there: write the page first (--page)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}): save it again from the page") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no object of JSON: save it again from the page")
    return values


def _page(pairs: Sequence[tuple[str, str, str]], name: str) -> str:
    shown = "\n".join(_pair(number, *pair) for number, pair in enumerate(pairs))
    page = _HTML.replace("@NAME@", name).replace("@COUNT@", str(len(pairs)))
    return page.replace("@PAIRS@", shown)  # last: what stands in texts is not replaced


def _pair(number: int, prompt: str, a: str, b: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="pair{number}" value="{value}"> {text}</label>'
        for value, text in (("A", "A is better"), ("B", "B is better"), ("tie", "neither"))
    )
    return (
        f"<section><h2>{number + 1}</h2><pre class=prompt>{html.escape(prompt)}</pre>"
        f"<div class=both><div><h3>A</h3><pre>{html.escape(a)}</pre></div>"
        f"<div><h3>B</h3><pre>{html.escape(b)}</pre></div></div><p>{buttons}</p></section>"
    )


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which answer is better?</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .7rem; }
pre.prompt { background: #e8f0f8; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
label { margin-right: 1.5rem; }
footer { position: sticky; bottom: 0; background: white; padding: .7rem 0; }
</style></head><body>
<h1>Which answer is better?</h1>
<p>Choose for as many pairs as you like, then save <code>choices.json</code> and give it to
<code>alignment_report.py --from-page</code>. What you choose stays in this page only until it is
closed.</p>
@PAIRS@
<footer><button onclick="save()">Save choices.json</button> <span id="count"></span></footer>
<script>
function chosen() {
  return Array.from({length: @COUNT@}, (_, n) => {
    const one = document.querySelector(`input[name=pair${n}]:checked`);
    return one ? one.value : null;
  });
}
function count() {
  const made = chosen().filter(one => one !== null).length;
  document.getElementById("count").textContent = `${made} of @COUNT@ chosen`;
}
function save() {
  const text = JSON.stringify({page: "@NAME@", choices: chosen()}, null, 1) + "\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "choices.json";
  link.click();
}
document.addEventListener("change", count);
count();
</script></body></html>
"""
