"""An exported folder that is damaged is refused with the file's name."""

from __future__ import annotations

import pytest

from equilibrium_mcore.hugging_face.intact import loading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x40\0\0\0\0\0\0\0{"),
        ("config.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("model.safetensors.index.json", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with (
        pytest.raises(ValueError, match=rf"{name} cannot be read: .*export again"),
        loading(tmp_path),
    ):
        pytest.fail("nothing is loaded from it")


def test_what_a_parser_raises_names_the_folder(tmp_path):
    told = f"{tmp_path} cannot be loaded: it has no 'model_type'"
    with pytest.raises(ValueError, match=told), loading(tmp_path):
        raise KeyError("model_type")
