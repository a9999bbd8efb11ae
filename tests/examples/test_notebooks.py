"""The notebooks: their cells parse, and the slow test executes both, one after the other."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest

from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.yaml_io import parse_yaml
from equilibrium_mcore.training.metrics import read_metrics
from tests.support.notebooks import cells_of, language_and_code

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
TIME_LIMIT_SECONDS = 1800  # of a cell: only one that hangs takes as long


def code_of(notebook: Path) -> list[tuple[str, str]]:
    """(language, code) of every code cell."""
    cells = (cell for cell in cells_of(notebook) if cell["cell_type"] == "code")
    return [language_and_code(cell["source"]) for cell in cells]


def test_there_are_two_notebooks():
    names = ["01_dataset_preparation.ipynb", "02_model_training.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_says_what_it_is_and_holds_no_outputs(notebook):
    book = json.loads(notebook.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert book["cells"][0]["cell_type"] == "markdown"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "parameters" in code[0]["metadata"]["tags"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_parse(notebook):
    languages = set()
    for language, code in code_of(notebook):
        languages.add(language)
        if language == "python":
            ast.parse(code)
        elif language == "yaml":
            assert isinstance(parse_yaml(code, source=notebook.name), dict)
        else:
            done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert languages == {"python", "bash", "yaml"}


def test_every_command_of_a_cell_can_fail_it():
    """`%%bash` alone asks for the status of the last command."""
    for notebook in NOTEBOOKS:
        sources = [cell["source"] for cell in cells_of(notebook)]
        assert all(s.startswith("%%bash -e\n") for s in sources if s.startswith("%%bash"))


def test_the_run_of_the_notebook_is_a_run(data, tmp_path):
    (text,) = (code for language, code in code_of(NOTEBOOKS[1]) if language == "yaml")
    run = parse_yaml(text, source="notebook")
    changes = {"data": data, "output_directory": str(tmp_path)}
    config = run_from_mapping({**run, **changes}, folder=ROOT / "configs" / "runs")
    assert config.parallelism.world_size == 2


@pytest.mark.slow
def test_both_notebooks_run_from_top_to_bottom(tmp_path):
    """In temporary copies, whose results go to a temporary folder."""
    import nbformat
    from nbclient import NotebookClient

    results = tmp_path / "results"
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        (folder,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
        assert folder.source == 'folder = "runs/notebooks"'
        folder.source = f"folder = {str(results)!r}"
        where = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(book, timeout=TIME_LIMIT_SECONDS, resources=where).execute()
    records = read_metrics(results / "run" / "metrics.jsonl")
    validation = [record for record in records if record["kind"] == "validation"]
    assert [record["step"] for record in validation] == [0, 30, 60]
    assert validation[-1]["loss"] < validation[-1]["unigram_entropy"]
    resumes = [r["details"] for r in records if r.get("event") == "resume"]
    assert [details.get("pipeline") for details in resumes] == [2]
    assert (results / "exported" / "model.safetensors").is_file()
    assert (results / "certificate.png").is_file() and (results / "report/report.md").is_file()
