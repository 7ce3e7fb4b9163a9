"""Headers of weights: whatever the bytes, an answer or a sentence."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import layout, tensorfile
from safelight.tensorfile import UnreadableWeights

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["dtype", "shape"]), inner),
)


def entries(content: bytes, suffix: str) -> list[tensorfile.Entry] | None:
    """Return what a file of these bytes holds; None where it is refused with a sentence that names it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"weights{suffix}"
        file.write_bytes(content)
        try:
            return tensorfile.entries(file)
        except UnreadableWeights as error:
            said = str(error)
        assert str(file) in said
        return None


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(st.binary(max_size=300), st.sampled_from(tensorfile.SUFFIXES), st.booleans())
def test_any_bytes_are_entries_or_a_sentence(content: bytes, suffix: str, begins_well: bool) -> None:
    begin = b"GGUF\3\0\0\0" if suffix == ".gguf" else len(content).to_bytes(8, "little")
    entries(begins_well * begin + content, suffix)


@given(JSON)
def test_any_header_is_entries_or_a_sentence(header: object) -> None:
    entries(safetensors(header), ".safetensors")
    entries(safetensors({"a": header}), ".safetensors")


@given(st.lists(st.integers(-3, 5), max_size=3), st.lists(st.integers(-5, 50), min_size=2, max_size=2))
def test_no_entry_lies_outside_of_its_file(shape: list[int], place: list[int]) -> None:
    header = {"a": {"dtype": "F16", "shape": shape, "data_offsets": place}}
    content = safetensors(header, bytes(40))

    for entry in entries(content, ".safetensors") or []:
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
        assert entry.nbytes == 2 * entry.parameters


def test_a_kind_that_is_not_read_is_named() -> None:
    header = {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mx.safetensors"
        file.write_bytes(safetensors(header, bytes(4)))

        with pytest.raises(UnreadableWeights, match="a is stored as F8_E8M0, which is not read"):
            tensorfile.entries(file)


def test_scales_of_groups_are_refused() -> None:
    """Four-bit floats of other programs have a scale a group of 16: nothing here multiplies those out."""
    file = Path("/fp4.safetensors")
    names = {
        "double_blocks.0.img_attn.qkv.weight": (96, 32),
        "single_blocks.0.linear1.weight": (9, 32),
        "img_in.weight": (8, 8),
    }
    found = [tensorfile.Entry(file, name, "F8_E4M3", shape, 0, 0) for name, shape in names.items()]
    scale = tensorfile.Entry(file, "double_blocks.0.img_attn.qkv.weight_scale", "F8_E4M3", (96, 4), 0, 0)

    assert layout.recognise(found, file).family == "flux"
    with pytest.raises(layout.OtherModel, match=r"weight_scale is F8_E4M3 of the shape \[96, 4\]"):
        layout.recognise([*found, scale], file)
    packed = [replace(entry, dtype="U8") for entry in found]
    with pytest.raises(layout.OtherModel, match="is of a weight that is U8"):
        layout.recognise([*packed, scale], file)
