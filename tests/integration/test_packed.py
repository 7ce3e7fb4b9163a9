"""What is packed comes back: values of every kind, and tensors with their bits and the layout of their memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from safelightd import packed
from safelightd.shards import NAMES

CPU = torch.device("cpu")


def there_and_back(value: object, file: Path) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    told = {"value": json.dumps(packed.pack(value, "a.value", tensors))}
    with file.open("wb") as stream:
        packed.write(stream, tensors, told)
    told, tensors = packed.read(file)
    return packed.unpack(json.loads(told["value"]), tensors, CPU)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -0.1, float("inf"), "text", [], (), {}, [1, [2, (3, "4")]], {1: {0: "a"}, "1": (None,)},
        (torch.bfloat16, torch.float32), CPU, [{"tuple": 1}, {"tensor": 2, "on": 3}, {"dict": [], "dtype": "no"}],
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_as_they_were(value: object, tmp_path: Path) -> None:
    back = there_and_back(value, tmp_path / "file")

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_numbers_of_every_dtype_come_back_with_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(24).reshape(2, 3, 4).remainder(2 if dtype is torch.bool else 24).to(dtype)
    back = there_and_back([numbers, {7: numbers[1, 2, 3]}, numbers[:0]], tmp_path / "file")

    assert [part.dtype for part in (back[0], back[1][7], back[2])] == [dtype] * 3
    assert torch.equal(back[0].view(torch.uint8), numbers.view(torch.uint8))
    assert back[1][7].item() == numbers[1, 2, 3].item()
    assert back[2].shape == (0, 3, 4)


def test_tensors_come_back_in_the_layout_of_their_memory_and_where_torch_would_put_them(tmp_path: Path) -> None:
    numbers = torch.randn(2, 3, 5)
    given = [numbers, numbers.transpose(1, 2), numbers.permute(2, 0, 1), numbers[:, 1:], torch.tensor(1.5)]
    back = there_and_back([torch.ones(3, dtype=torch.uint8), *given], tmp_path / "file")[1:]

    assert all(map(torch.equal, back, given))
    assert [part.stride() for part in back] == [part.clone().stride() for part in given]
    assert all(part.data_ptr() % 64 == torch.empty(8).data_ptr() % 64 == 0 for part in back)


def test_a_tensor_larger_than_a_piece_comes_back_whole(tmp_path: Path) -> None:
    numbers = torch.arange(packed.PIECE_BYTES // 4 + 3, dtype=torch.int32)

    assert torch.equal(there_and_back(numbers, tmp_path / "file"), numbers)


def test_a_file_is_read_a_tensor_at_a_time_and_whatever_took_its_place(tmp_path: Path) -> None:
    """A cache's has gigabytes, which nobody counts while the transformer is loaded."""
    file, other = tmp_path / "file", tmp_path / "other"
    numbers = {str(i): torch.full((8 * 2**20,), float(i)) for i in range(4)}  # 32 MiB each
    with file.open("wb") as stream:
        packed.write(stream, numbers, {})
    tracemalloc.start()
    try:
        _, tensors = packed.read(file)
        other.write_bytes(b"another")
        other.replace(file)
        for name in tensors:
            assert torch.equal(tensors[name], numbers[name])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 80 * 2**20


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.zeros(1, dtype=torch.complex64), {(): object()}])
def test_what_nobody_could_give_back_is_no_value(value: object) -> None:
    with pytest.raises(TypeError, match=r"^a\.value.* is a .*: no checkpoint can hold it$"):
        packed.pack([value], "a.value", {})


@pytest.mark.parametrize("change", ["cut", "longer", "flipped", "empty", "another"])
def test_what_is_not_what_was_written_is_damaged(change: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    there_and_back(torch.arange(100), file)
    content = file.read_bytes()
    changed = {
        "cut": content[:-1],
        "longer": content + b" ",
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "another": b"no digest\n" + content,
    }
    file.write_bytes(changed[change])

    with pytest.raises(packed.Damaged):
        packed.read(file)
