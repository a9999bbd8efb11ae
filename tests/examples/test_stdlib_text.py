"""The quickstart's text comes from what Python ships, the same each time."""

import json
import subprocess
import sys


def test_two_sources_in_a_fixed_order(tmp_path, repository):
    script = repository / "examples" / "stdlib_text.py"
    runs = []
    for name in ("first", "second"):
        folder = tmp_path / name
        command = [sys.executable, script, "--output-directory", folder, "--max-megabytes", "0.5"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "code.jsonl" in done.stdout and "prose.jsonl" in done.stdout
        runs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert runs[0] == runs[1]
    assert set(runs[0]) == {"code.jsonl", "prose.jsonl"}
    for name, data in runs[0].items():
        assert 300_000 < len(data) <= 500_000
        records = [json.loads(line) for line in data.splitlines()]
        assert len(records) > 10
        sources = [record["source"] for record in records]
        assert len(set(sources)) == len(sources)
        assert sources != sorted(sources)
        assert all(record["text"].strip() for record in records)
        if name == "code.jsonl":
            assert all(source.endswith(".py") for source in sources)
            assert not any("/test/" in source for source in sources)
