"""Reading and writing folders of safetensors shards one tensor at a time.

The header of every shard is parsed and checked here, so that a damaged file is reported with the name of the tensor it
concerns and before any work is done; values are read with one `readinto`, written with one `write`. Layout of a file:
8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the values.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molmo2_nemo.convert.digests import check_digests, write_digests
from molmo2_nemo.convert.json_files import parse_object
from molmo2_nemo.errors import ConversionError, plural

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor in its file. `start` counts bytes from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, or shards and their index. Nothing but headers is read here.

    Raises:
        ConversionError: only pickled weights, no weights, an index that names a missing file or tensor, a shard with
            tensors the index does not know, a truncated shard, an unknown value type, two sets of weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.notes: list[str] = []  # what was there and is not read
        index, single = folder / INDEX_NAME, folder / SINGLE_NAME
        if single.is_file() and self.index_counts(index):
            self.read_index(index)
        elif single.is_file():
            self.tensors = read_header(single)
        elif index.is_file():
            self.read_index(index)
        else:
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            if pickles:
                raise ConversionError(
                    f"{folder} has pickled weights only ({pickles[0]}); pickles can run code and are never loaded: "
                    "convert them to safetensors first"
                )
            raise ConversionError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def index_counts(self, index: Path) -> bool:
        """Whether an index beside `model.safetensors` is that file's own. One whose shards are gone is left over from
        an earlier model, and not read.

        Raises:
            ConversionError: its shards are there too: two models, or one twice.
        """
        if not index.is_file():
            return False
        shards = set(self.weight_map(index).values())
        if not shards:
            self.notes.append(f"{INDEX_NAME} names no tensors: it was not read, {SINGLE_NAME} was")
            return False
        if shards == {SINGLE_NAME}:
            return True
        if all((self.folder / file).is_file() for file in shards):
            raise ConversionError(
                f"{self.folder} holds two sets of weights, {SINGLE_NAME} and the {plural(len(shards), 'file')} that "
                f"{INDEX_NAME} names; remove the one that is not the model's (transformers reads the single file)"
            )
        self.notes.append(f"{INDEX_NAME} names files that are gone: it was not read, {SINGLE_NAME} was")
        return False

    @staticmethod
    def weight_map(index: Path) -> dict[str, str]:
        """An index's file of every tensor."""
        found = parse_object(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ConversionError(f"{index} is not an index: it has no weight_map of names and files")
        return found

    def read_index(self, index: Path) -> None:
        """Headers of all shards that the index names."""
        files = self.weight_map(index)
        if not files:
            raise ConversionError(f"{index} names no tensors: its weight_map is empty")
        for file in dict.fromkeys(files.values()):
            path = self.folder / file
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConversionError(f"{index} names {file!r}, expected a .safetensors file in the same folder")
            if not path.is_file():
                first = next(name for name, where in files.items() if where == file)
                raise ConversionError(f"{index} names {file}, which does not exist (it should hold {first})")
            for name, info in read_header(path).items():
                if files.get(name) != file:
                    raise ConversionError(f"{path} holds {name}, which {index.name} does not place there")
                self.tensors[name] = info
        missing = files.keys() - self.tensors.keys()
        if missing:
            name = min(missing)
            raise ConversionError(f"{self.folder / files[name]} lacks {name}, which {index.name} places there")

    def verify(self) -> None:
        """Read all files once and compare them with the folder's SHA256SUMS, if it has one; a note for each that is not
        in it.

        Raises:
            ConversionError: a file is another than the one that was listed.
        """
        self.notes += check_digests(self.folder, {info.file for info in self.tensors.values()})

    def check(self, shapes: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        """Compare names and shapes with what a model needs.

        Raises:
            ConversionError: a tensor is missing, not part of the model, or of another shape; names the first few.
        """
        missing = [name for name in shapes if name not in self.tensors and name not in optional]
        if missing:
            raise ConversionError(f"{self.folder} lacks {listing(missing)}")
        extra = [name for name in self.tensors if name not in shapes]
        if extra:
            raise ConversionError(f"{self.folder} has {listing(extra)} that the model of its config.json does not have")
        for name, info in self.tensors.items():
            if info.shape != tuple(shapes[name]):
                raise ConversionError(
                    f"{name} in {info.file} has shape {list(info.shape)}, expected {list(shapes[name])}"
                )
            if not info.dtype.is_floating_point:
                raise ConversionError(f"{name} in {info.file} is of type {info.dtype}, expected floating point")

    def read(self, name: str) -> Tensor:
        """Read the values of one tensor."""
        info = self.tensors[name]
        tensor = torch.empty(info.nbytes, dtype=torch.uint8)
        with info.file.open("rb") as file:
            file.seek(info.start)
            if info.nbytes and file.readinto(tensor.numpy()) != info.nbytes:  # type: ignore[attr-defined,arg-type]
                raise ConversionError(f"{info.file} ended while reading {name}; it changed during the conversion")
        return tensor.view(info.dtype).view(info.shape)


def listing(names: list[str]) -> str:
    """The first few of a list of tensor names, for messages."""
    shown = ", ".join(names[:3])
    rest = len(names) - 3
    return f"tensor{'s' if len(names) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and positions of a shard's tensors, checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > MAX_HEADER_BYTES or 8 + length > size:
            raise ConversionError(f"{path} is not a safetensors file, or its header is cut off ({size} bytes)")
        header = parse_object(file.read(length), f"the safetensors header of {path}")
    header.pop("__metadata__", None)
    tensors = {name: tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    check_layout(path, tensors, 8 + length, size)
    return tensors


def check_layout(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Every byte after the header belongs to one tensor, as the format demands.

    Raises:
        ConversionError: tensors overlap, or there are bytes between or behind them.
    """
    at = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "does not follow the bytes before it"
            raise ConversionError(f"{path} is damaged: {name} begins at byte {info.start}, expected {at}: it {what}")
        at += info.nbytes
    if at != size:
        raise ConversionError(f"{path} is damaged: its tensors end at byte {at}, the file has {size}")


def tensor_info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    """One header entry; `base` is where values begin, `size` the file's size."""

    def sizes(key: str) -> list[int]:
        found = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(found, list) or not all(isinstance(item, int) and item >= 0 for item in found):
            raise ConversionError(f"the safetensors header of {path} is damaged: {key} of {name} is {found!r:.60}")
        return found

    shape, offsets = tuple(sizes("shape")), sizes("data_offsets")
    stored_as = str(entry.get("dtype"))
    if stored_as not in DTYPES:
        raise ConversionError(f"{name} in {path} is of type {stored_as:.60}, expected one of {', '.join(DTYPES)}")
    if len(offsets) != 2:
        raise ConversionError(f"the safetensors header of {path} is damaged: {name} has {len(offsets)} offsets")
    dtype, (start, end) = DTYPES[stored_as], offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ConversionError(f"{name} in {path} has {end - start} bytes, which does not fit its shape {list(shape)}")
    if base + end > size:
        raise ConversionError(f"{path} is truncated: {name} should end at byte {base + end}, the file has {size}")
    return TensorInfo(path, dtype, shape, base + start, end - start)


class SafetensorsWriter:
    """Writes tensors of known shapes and types into shards, in any order, each as soon as it is available.

    Use as a context manager: leaving it without an error checks that every tensor was written, and writes the files'
    digests.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.missing = set(shapes)
        shards = self.plan(shapes, dtypes, max_shard_bytes)
        for i, names in enumerate(shards):
            single = len(shards) == 1
            file = folder / (SINGLE_NAME if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
            self.start_shard(file, {name: (dtypes[name], tuple(shapes[name])) for name in names})
        if len(shards) > 1:
            self.write_index()

    @staticmethod
    def plan(
        shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_bytes: int
    ) -> list[list[str]]:
        """Names per shard, in order; a shard is closed before it would pass `max_bytes`."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtypes[name].itemsize
            if shards[-1] and filled + nbytes > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += nbytes
        return shards

    def start_shard(self, file: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Write a shard's header and give the file its final size."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # wide types first, so that every tensor is aligned to its own type
        for name, (dtype, shape) in sorted(entries.items(), key=lambda item: -item[1][0].itemsize):
            nbytes = math.prod(shape) * dtype.itemsize
            offsets = [offset, offset + nbytes]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
        self.tensors |= read_header(file)

    def write_index(self) -> None:
        """`model.safetensors.index.json`."""
        total = sum(info.nbytes for info in self.tensors.values())
        parameters = sum(math.prod(info.shape) for info in self.tensors.values())
        weight_map = {name: self.tensors[name].file.name for name in sorted(self.tensors)}
        data = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX_NAME).write_text(json.dumps(data, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor, cast to its planned type."""
        info = self.tensors[name]
        assert tuple(tensor.shape) == info.shape, (name, tensor.shape, info.shape)
        values = tensor.detach().to(device="cpu", dtype=info.dtype).contiguous().reshape(-1)
        with info.file.open("r+b") as file:
            file.seek(info.start)
            file.write(values.view(torch.uint8).numpy().data)
        self.missing.discard(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert kind is not None or not self.missing, f"never written: {sorted(self.missing)[:3]}"
        if kind is None:
            write_digests(self.folder, {info.file for info in self.tensors.values()})
