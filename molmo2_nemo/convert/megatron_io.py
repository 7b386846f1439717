"""Megatron's distributed checkpoints (`torch_dist`), read and written tensor by tensor, in one process, with no model.

Such a checkpoint is a folder with `.metadata` (which tensor is cut into which chunks, in which file at which offset),
`*.distcp` files (each chunk as torch.save wrote it), `common.pt` and `metadata.json`. It may have been written under
any tensor- and pipeline-parallel layout: a chunk knows its place in the whole tensor. Decoder layers are stored
stacked, `decoder.layers.<rest>` of shape [layers, ...]. NeMo puts the four into `<checkpoint>/weights/`.

Nothing from a file is run: chunks are read with `weights_only=True`, and `.metadata`, which torch pickles, is read by
an unpickler that knows only the classes of that format.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from molmo2_nemo.convert.json_files import parse_object
from molmo2_nemo.convert.names import canonical_shapes
from molmo2_nemo.convert.safetensors_io import listing
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.rundir import checkpoint_manifest

PREFIX = "module."  # of model tensors in a trainer's checkpoint
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
# Layers whose (empty) extra state Megatron expects when it loads.
EXTRA_STATE_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
MAX_FILE_BYTES = 5_000_000_000

# Every class and function in a checkpoint's metadata, besides torch's dtypes.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Loads the classes of checkpoint metadata and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(class, name)
        raise ConversionError(f"refused to load {module}.{name}: not part of a checkpoint's metadata")


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """getattr for the members of enums and nothing else."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise ConversionError(f"refused to load getattr of {kind!r}: not part of a checkpoint's metadata")


class _FileSlice(io.RawIOBase):
    """Bytes start .. start + length of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self.position))
        self.file.seek(self.start + self.position)
        count = self.file.readinto(view[:count])  # type: ignore[attr-defined]
        self.position += count
        return count


class MegatronCheckpoint:
    """The model tensors of a distributed checkpoint under canonical names. Only `.metadata` is read here.

    Args:
        folder: the checkpoint, or its `weights` folder.

    Raises:
        ConversionError: not a finished distributed checkpoint, or one in another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "weights" if (folder / "weights").is_dir() else folder
        if not self.folder.is_dir():
            raise ConversionError(f"{folder} does not exist; expected a Megatron checkpoint")
        try:
            backend = parse_object((self.folder / "metadata.json").read_bytes(), "metadata.json")["sharded_backend"]
        except (OSError, UserError, KeyError) as error:
            raise ConversionError(
                f"{self.folder} is not a Megatron distributed checkpoint (metadata.json is missing or damaged); if a "
                "training run wrote it, the run was interrupted while saving: use an earlier checkpoint"
            ) from error
        if backend != "torch_dist":
            raise ConversionError(f"{self.folder} is stored as {backend!r}, expected 'torch_dist'")
        self.metadata = self.read_metadata()
        self.tensors: dict[str, TensorStorageMetadata] = {}
        for key, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and key.startswith(PREFIX):
                self.tensors[key] = entry
        if not self.tensors:
            raise ConversionError(f"{self.folder} holds no model tensors (no key begins with {PREFIX!r})")

    def read_metadata(self) -> Metadata:
        """The contents of `.metadata`, unpickled with a restricted set of classes."""
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError as error:
            raise ConversionError(f"{path} is missing; the checkpoint is incomplete") from error
        except ConversionError as error:
            raise ConversionError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle raises almost anything
            other = checkpoint_manifest.other_versions(self.folder.parent)
            why = f"cannot be read: {other}" if other else "is damaged"
            raise ConversionError(f"{path} {why} ({error!r})") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ConversionError(f"{path} does not hold a checkpoint's metadata")
        return metadata

    @property
    def has_adapters(self) -> bool:
        """Whether the checkpoint holds LoRA adapters."""
        return any(key.endswith(".lora_a") for key in self.tensors)

    def locate(self, name: str) -> tuple[str, int | None]:
        """Stored key of a canonical tensor, and its index on the first axis where layers are stacked.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        if PREFIX + name in self.tensors:
            return PREFIX + name, None
        match = LAYER.match(name)
        if match:
            stacked = f"{PREFIX}decoder.layers.{match[2]}"
            if stacked in self.tensors and int(match[1]) < self.tensors[stacked].size[0]:
                return stacked, int(match[1])
        raise KeyError(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a canonical tensor (vocabulary rows may be padded)."""
        key, layer = self.locate(name)
        size = tuple(self.tensors[key].size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a canonical tensor."""
        return self.tensors[self.locate(name)[0]].properties.dtype

    def check(self, model_config: Molmo2Config) -> None:
        """Compare stored tensors with those of a model.

        Raises:
            ConversionError: names tensors that are missing, left over, or of another shape.
        """
        wanted = canonical_shapes(model_config)
        missing, used = [], set()
        for name, shape in wanted.items():
            try:
                key, layer = self.locate(name)
            except KeyError:
                missing.append(name)
                continue
            used.add(key)
            stored = tuple(self.tensors[key].size)[0 if layer is None else 1 :]
            padded = name in ("embedding.base.weight", "output_layer.weight")
            if stored[1:] != shape[1:] or (stored[0] < shape[0] if padded else stored[0] != shape[0]):
                raise ConversionError(
                    f"{key} in {self.folder} has shape {list(stored)} per tensor, expected {list(shape)} for model "
                    f"{model_config.name!r}"
                )
        if missing:
            raise ConversionError(f"{self.folder} lacks {listing(missing)} of model {model_config.name!r}")
        extra = [key for key in self.tensors if key not in used]
        layers = model_config.text.num_layers
        extra += [key for key in used if key.startswith(f"{PREFIX}decoder.layers.") and self.depth(key) > layers]
        if extra:
            raise ConversionError(f"{self.folder} has {listing(extra)} that model {model_config.name!r} does not have")

    def depth(self, key: str) -> int:
        """Number of layers stacked in a stored tensor, 0 where it holds one layer's."""
        return 0 if LAYER.match(key.removeprefix(PREFIX)) else self.tensors[key].size[0]

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """The whole of one canonical tensor; `rows` cuts padding rows off."""
        key, layer = self.locate(name)
        entry = self.tensors[key]
        size = tuple(entry.size)
        chunks = [c for c in entry.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        if len(chunks) == 1 and tuple(chunks[0].sizes) == (size if layer is None else (1, *size[1:])):
            tensor = self.read_chunk(key, chunks[0])
            return (tensor if layer is None else tensor[0])[:rows]
        result = torch.empty(size if layer is None else size[1:], dtype=entry.properties.dtype)
        covered = 0
        for chunk in chunks:
            part, offsets, sizes = self.read_chunk(key, chunk), list(chunk.offsets), list(chunk.sizes)
            if layer is not None:
                part, offsets, sizes = part[layer - offsets[0]], offsets[1:], sizes[1:]
            result[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
            covered += part.numel()
        if covered != result.numel():
            raise ConversionError(f"{key} in {self.folder} is incomplete: {covered} of {result.numel()} values stored")
        return result[:rows]

    def read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """One stored chunk, checked against its entry in `.metadata`."""
        assert self.metadata.storage_data is not None
        where = self.metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if where is None or getattr(where, "transform_descriptors", None):
            raise ConversionError(
                f"{key} in {self.folder}: chunk at {list(chunk.offsets)} has no readable storage entry"
            )
        path = self.folder / Path(where.relative_path).name
        if not path.is_file():
            raise ConversionError(f"{path} is missing (it should hold {key})")
        if path.stat().st_size < where.offset + where.length:
            raise ConversionError(
                f"{path} is truncated: {key} should end at byte {where.offset + where.length}, the file has "
                f"{path.stat().st_size}"
            )
        try:
            with path.open("rb") as file:
                stream = io.BufferedReader(_FileSlice(file, where.offset, where.length))
                tensor = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # the type of error depends on the damaged byte
            raise ConversionError(f"{path} is damaged where it should hold {key}: {error}") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise ConversionError(f"{path} does not hold {key} of shape {list(chunk.sizes)} where it should")
        return tensor


class MegatronWriter:
    """Writes a distributed checkpoint that any layout can load, each tensor as soon as it is available."""

    def __init__(self, folder: Path, model_config: Molmo2Config) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model_config = folder, model_config
        self.shapes = canonical_shapes(model_config)
        self.missing = set(self.shapes)
        self.entries: dict[str, Any] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.file_index = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one canonical tensor whole."""
        assert tuple(tensor.shape) == self.shapes[name], (name, tensor.shape, self.shapes[name])
        tensor = tensor.detach().cpu()
        # torch.save stores the memory behind a view: a slice must not drag the whole table along
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.contiguous()
        match = LAYER.match(name)
        key, offsets, size = PREFIX + name, [0] * tensor.dim(), tuple(tensor.shape)
        if match:
            key = f"{PREFIX}decoder.layers.{match[2]}"
            offsets, size = [int(match[1]), *offsets], (self.model_config.text.num_layers, *size)
            tensor = tensor[None]
        entry = self.entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(size), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        self.append(MetadataIndex(key, offsets), tensor)
        self.missing.discard(name)

    def append(self, index: MetadataIndex, value: Any) -> None:
        """Append a value with torch.save and record its position."""
        path = self.folder / f"__0_{self.file_index}.distcp"
        with path.open("ab") as file:
            start = file.tell()
            torch.save(value, file)
            end = file.tell()
        self.storage[index] = _StorageInfo(path.name, start, end - start)
        if end >= MAX_FILE_BYTES:
            self.file_index += 1

    def finish(self) -> None:
        """Write what makes the folder a checkpoint; call it last."""
        assert not self.missing, f"never written: {sorted(self.missing)[:3]}"
        layers = self.model_config.text.num_layers
        states = [
            f"decoder.layers.{name}._extra_state/shard_{i}_{layers}"
            for name in EXTRA_STATE_LAYERS
            for i in range(layers)
        ]
        for state in [*states, "output_layer._extra_state/shard_0_1"]:
            self.entries[PREFIX + state] = BytesStorageMetadata()
            self.append(MetadataIndex(PREFIX + state), [None])
        torch.save({}, self.folder / "common.pt")
        metadata = Metadata(self.entries, storage_data=self.storage, storage_meta=StorageMeta())
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        versions |= {"common_backend": "torch", "common_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(versions))
