"""What is in a folder of Hugging Face's? Its config.json, and every tensor's place; contents are read when asked for.

Only safetensors: a pickle executes whatever it says. Files are mapped, so that what is read is the kernel's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from concertina.errors import CheckpointError, ConfigError, NotFoundError
from concertina.model.families import Piece
from concertina.state.streamed import DTYPE_NAMES

__all__ = ["INDEX", "SINGLE", "HuggingFaceFolder", "Stored"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor on storage; `dtype` as safetensors writes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HuggingFaceFolder:
    """Raises NotFoundError for a folder without a model, ConfigError for what is not JSON, and CheckpointError where
    files are not what they or the index say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path}: no config.json: give the folder of a Hugging Face model", path=str(path))
        self.config: dict[str, Any] = _read_object(path / "config.json")
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            self.tensors |= _stored(path / file)
        self._check_index()
        self._opened: tuple[str, Any] = ("", None)

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            names = set(self._index().values())
            strange = sorted(name for name in names if Path(name).name != name)
            if strange:
                raise CheckpointError(f"{self.path / INDEX}: {strange[0]!r} is not a file of this folder")
            return sorted(names)
        if not (self.path / SINGLE).is_file():
            pickles = sorted(file.name for file in self.path.glob("*.bin"))
            instead = f"; {pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else ""
            raise NotFoundError(f"{self.path}: neither {SINGLE} nor {INDEX}{instead}", path=str(self.path))
        return [SINGLE]

    def _index(self) -> dict[str, str]:
        found = _read_object(self.path / INDEX).get("weight_map")
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / INDEX}: has no weight_map")
        return found

    def _check_index(self) -> None:
        """The index names exactly the tensors that the files hold."""
        if not (self.path / INDEX).is_file():
            return
        index = self._index()
        wrong = [name for name in {**index, **self.tensors} if index.get(name) != self._file_of(name)]
        if wrong:
            text = f"{self.path / INDEX}: {len(wrong)} tensors are not where it says, the first is {min(wrong)}"
            raise CheckpointError(text, tensors=wrong)

    def _file_of(self, name: str) -> str | None:
        return self.tensors[name].file if name in self.tensors else None

    @property
    def fused(self) -> bool:
        """Whether experts are stacked, as in transformers' memory, rather than one by one."""
        return any(name.endswith(".experts.gate_up_proj") for name in self.tensors)

    def dtype(self, table: Iterable[Piece]) -> torch.dtype:
        """The one that holds the table's tensors exactly, but for those that are wide in any case: float64, bfloat16,
        or else float32. Raises ConfigError for quantized ones."""
        names = {self.tensors[piece.theirs].dtype for piece in table if not piece.wide}
        unknown = sorted(names - _DTYPES.keys())
        if unknown:
            raise ConfigError(f"{self.path}: tensors of {', '.join(unknown)} are not supported: dequantize them first")
        widest = torch.bfloat16 if names == {"BF16"} else torch.float32
        return torch.float64 if "F64" in names else widest

    def check(self, table: Iterable[Piece], ignored: Iterable[str] = ()) -> None:
        """Key count and shapes: the folder has the tensors of the table and no other, but for those that begin with
        one of `ignored`. Raises CheckpointError with the first that is wrong."""
        wanted = {piece.theirs: piece.shape for piece in table}
        left = tuple(ignored)
        surplus = [name for name in self.tensors if name not in wanted and not (left and name.startswith(left))]
        missing = [name for name in wanted if name not in self.tensors]
        for names, verb in ((missing, "missing"), (surplus, "none of the model's")):
            if names:
                count = f"{len(names)} of {len(wanted)} tensors" if verb == "missing" else f"{len(names)} tensors"
                raise CheckpointError(f"{self.path}: {count} are {verb}, the first is {names[0]}", tensors=names)
        for name, shape in wanted.items():
            if self.tensors[name].shape != shape:
                found = self.tensors[name].shape
                raise CheckpointError(f"{self.path}: {name} has shape {found}, config.json says {shape}", tensor=name)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped."""
        file = self.tensors[name].file
        if self._opened[0] != file:
            self._opened = (file, safe_open(self.path / file, framework="pt"))
        tensor: Tensor = self._opened[1].get_tensor(name)
        return tensor

    def fill(self, pieces: Iterable[Piece], into: Mapping[str, Tensor]) -> None:
        """Copy the pieces' tensors into ours, whole global ones by name."""
        for piece in pieces:
            part = piece.part(into)
            part.copy_(self.read(piece.theirs).reshape(part.shape))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}", path=str(path)) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object", path=str(path))
    return found


def _stored(path: Path) -> dict[str, Stored]:
    """The header of a safetensors file, which must be as long as that says."""
    try:
        return dict(_entries(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, the index names it", file=path.name) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}", file=path.name) from None


def _entries(path: Path) -> Iterator[tuple[str, Stored]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{size} bytes, its header alone would be {length}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise ValueError(f"{size} bytes, its header says {end}")
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        stored = Stored(path.name, entry["dtype"], tuple(entry["shape"]))
        if stored.dtype in _DTYPES and last - first != prod(stored.shape) * _DTYPES[stored.dtype].itemsize:
            raise ValueError(f"{name} of shape {stored.shape} in {last - first} bytes")
        yield name, stored
