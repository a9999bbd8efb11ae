"""One table, three ways to write it: what stands in a cell never breaks the table."""

from __future__ import annotations

import csv
import io

import pytest

from equilibrium_mcore.files.tables import (
    csv_table,
    markdown_table,
    markdown_text,
    terminal_table,
)

HEAD = ("source", "documents", "share")
ROWS = [("a|b", 12, "50.0%"), ("a longer\nname", 1_234, "1.0%")]


def test_markdown_keeps_each_cell_in_its_column():
    assert markdown_table(HEAD, ROWS, align="lr") == (
        "| source | documents | share |\n"
        "|---|---:|---:|\n"
        "| a\\|b | 12 | 50.0% |\n"
        "| a longer name | 1234 | 1.0% |"
    )
    assert markdown_table(HEAD, []).splitlines()[1] == "|---|---|---|"
    assert markdown_table(HEAD, [], align="lrl").splitlines()[1] == "|---|---:|---|"


def test_text_stands_in_markdown_as_it_is():
    assert markdown_text("a \\ <b>") == "a \\\\ &lt;b>"


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("a", 1, "long words"), ("abc", 12_345_678_901, "")]
    assert terminal_table(HEAD, rows, align="lrl").splitlines() == [
        "source    documents  share",
        "a                 1  long words",
        "abc     12345678901",
    ]


def test_csv_is_read_back():
    rows = [("a, b", None, 0.5), ('a "quoted"\nline', 3, "")]
    assert list(csv.reader(io.StringIO(csv_table(HEAD, rows)))) == [
        list(HEAD),
        ["a, b", "", "0.5"],
        ['a "quoted"\nline', "3", ""],
    ]


@pytest.mark.parametrize("write", [markdown_table, terminal_table, csv_table])
def test_a_row_that_does_not_fit_is_an_error(write):
    with pytest.raises(ValueError, match="2 cells under a head of 3"):
        write(HEAD, [("a", 1)])
