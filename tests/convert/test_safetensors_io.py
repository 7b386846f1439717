"""Streaming safetensors files: readable by the library, and every kind of damage named."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert.digests import DIGESTS
from molmo2_nemo.convert.folders import new_folder
from molmo2_nemo.convert.safetensors_io import INDEX_NAME, SINGLE_NAME, SafetensorsFolder, SafetensorsWriter
from molmo2_nemo.errors import ConversionError

torch.set_num_threads(1)
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.bias": torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16),
    "c": torch.tensor(7.0),
    "empty": torch.zeros(0, 4),
}
SHAPES = {name: tuple(t.shape) for name, t in TENSORS.items()}


def write(folder: Path, max_shard_bytes: int = 10**9) -> None:
    dtypes = {name: t.dtype for name, t in TENSORS.items()}
    with SafetensorsWriter(folder, SHAPES, dtypes, max_shard_bytes) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])


def test_single_file_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    write(tmp_path)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    ours = SafetensorsFolder(tmp_path)
    ours.check(SHAPES)
    for name, tensor in TENSORS.items():
        for read in (loaded[name], ours.read(name)):
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_shards_and_index(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=50)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_parameters": 16, "total_size": 58}
    assert index["weight_map"]["a.weight"] == "model-00001-of-00002.safetensors"
    ours = SafetensorsFolder(tmp_path)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in TENSORS.items())
    merged = {}
    for file in set(index["weight_map"].values()):
        merged |= safetensors.torch.load_file(tmp_path / file)
    assert merged.keys() == TENSORS.keys()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    ours = SafetensorsFolder(tmp_path)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    dtypes = {name: t.dtype for name, t in TENSORS.items()}
    with pytest.raises(AssertionError, match="never written"), SafetensorsWriter(tmp_path, SHAPES, dtypes):
        pass


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES | {"d.weight": (1,)}, "lacks tensor d.weight"),
        ({k: v for k, v in SHAPES.items() if k != "c"}, "has tensor c that the model"),
        (SHAPES | {"a.weight": (4, 3)}, r"a.weight in .*model.safetensors has shape \[3, 4\], expected \[4, 3\]"),
    ],
)
def test_check_names_the_difference(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    write(tmp_path)
    with pytest.raises(ConversionError, match=message):
        SafetensorsFolder(tmp_path).check(shapes)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file({"c": torch.tensor(7)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="c in .* is of type torch.int64, expected floating point"):
        SafetensorsFolder(tmp_path).check({"c": ()})


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_truncated_shard(tmp_path: Path, cut: int) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ConversionError, match=r"model.safetensors is (truncated: \S+ should end|not a safetensors)"):
        SafetensorsFolder(tmp_path)


def test_not_safetensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConversionError, match="is not a safetensors file"):
        SafetensorsFolder(tmp_path)


def test_bytes_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConversionError, match=r"x in .* has 8 bytes, which does not fit its shape \[3\]"):
        SafetensorsFolder(tmp_path)


def test_index_problems(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=50)
    index_path = tmp_path / INDEX_NAME
    index = json.loads(index_path.read_text())
    second = tmp_path / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ConversionError, match=r"names model-00002-of-00002.safetensors, which does not exist"):
        SafetensorsFolder(tmp_path)
    second.write_bytes(kept)
    index["weight_map"]["ghost"] = second.name
    index_path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="lacks ghost, which model.safetensors.index.json places there"):
        SafetensorsFolder(tmp_path)
    del index["weight_map"]["ghost"], index["weight_map"]["b.bias"]
    index_path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="holds b.bias, which model.safetensors.index.json does not place there"):
        SafetensorsFolder(tmp_path)
    index_path.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ConversionError, match="expected a .safetensors file in the same folder"):
        SafetensorsFolder(tmp_path)
    index_path.write_text("[]")
    with pytest.raises(ConversionError, match="holds a list, expected an object"):
        SafetensorsFolder(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pickled weights only \(pytorch_model.bin\)"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match="has neither model.safetensors nor"):
        SafetensorsFolder(tmp_path)


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as staging:
        (staging / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    with pytest.raises(ConversionError, match="already exists"), new_folder(target):
        pass


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        *({"a": value} for value in (None, 3, "x", [], {})),
        *({"a": GOOD | {"shape": value}} for value in (None, 3, "x", ["2"], [2.0], [-2], [None], {"x": 1})),
        *({"a": GOOD | {"data_offsets": value}} for value in (None, [0], [0, 8, 16], ["0", "8"], [-8, 0], [8, 0])),
        *({"a": GOOD | {"dtype": value}} for value in (None, 3, "F8", [], {})),
        [],
        3,
        None,
    ],
    ids=lambda header: json.dumps(header)[:60],
)
def test_damaged_headers_end_in_one_line(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ConversionError) as caught:
        SafetensorsFolder(tmp_path)
    assert SINGLE_NAME in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "values", "fits"),
    [
        (([0, 8], [8, 16]), 16, True),
        (([8, 16], [0, 8]), 16, True),
        (([0, 8], [0, 8]), 8, False),  # the same bytes twice
        (([0, 8], [4, 12]), 12, False),
        (([0, 8], [12, 20]), 20, False),  # a gap
        (([4, 12], [12, 20]), 20, False),
        (([0, 8], [8, 16]), 17, False),  # bytes behind
    ],
)
def test_layouts_are_taken_or_refused_as_by_the_library(
    tmp_path: Path, offsets: tuple[list[int], list[int]], values: int, fits: bool
) -> None:
    text = json.dumps({name: GOOD | {"data_offsets": at} for name, at in zip("ab", offsets, strict=True)}).encode()
    file = tmp_path / SINGLE_NAME
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(values))
    if fits:
        assert SafetensorsFolder(tmp_path).tensors.keys() == safetensors.torch.load_file(file).keys()
        return
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(file)
    with pytest.raises(ConversionError, match=f"{SINGLE_NAME} is damaged: "):
        SafetensorsFolder(tmp_path)


def test_a_header_nested_too_deeply(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ConversionError, match="header of .* is nested too deeply"):
        SafetensorsFolder(tmp_path)


def test_digests_are_written_and_compared(tmp_path: Path) -> None:
    """Oracle: hashlib over each file. A changed byte of a value shows nowhere else: headers and sizes are as before."""
    write(tmp_path, max_shard_bytes=50)
    files = sorted(tmp_path.glob("*.safetensors"))
    expected = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert (tmp_path / DIGESTS).read_text() == expected and len(files) == 2
    folder = SafetensorsFolder(tmp_path)
    folder.verify()
    assert folder.notes == []
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    SafetensorsFolder(tmp_path).check(SHAPES)
    with pytest.raises(ConversionError, match=rf"{files[1].name} is not the file that SHA256SUMS lists .* remove /"):
        SafetensorsFolder(tmp_path).verify()
    lines = expected.splitlines(keepends=True)
    (tmp_path / DIGESTS).write_text(lines[0].replace("  ", " *./"))  # as another tool may write it; the other is new
    folder = SafetensorsFolder(tmp_path)
    folder.verify()
    assert folder.notes == [f"{files[1].name} is not in SHA256SUMS: it was not compared"]
    (tmp_path / DIGESTS).write_text(lines[0] + "nonsense\n")
    with pytest.raises(ConversionError, match="SHA256SUMS, line 2: expected a SHA-256, two blanks"):
        SafetensorsFolder(tmp_path).verify()


def test_a_folder_without_digests_is_taken(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / SINGLE_NAME)
    folder = SafetensorsFolder(tmp_path)
    folder.verify()
    assert folder.notes == []
