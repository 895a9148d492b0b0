"""Tensors out of a torch weight file, without torch and without running what the file says.

The format is the one `torch.save` wrote before version 1.6: four pickles (magic number, protocol, facts about the
machine, state dict), a fifth with the list of storage keys, then for each key an 8-byte count and that many raw
little-endian values. See `_legacy_save` in torch/serialization.py.
"""

import hashlib
import io
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from touchline.core.errors import TouchlineError, one_line

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """Every tensor of the state dict in `path`, by its name, as read-only float32 or int64 arrays.

    The file is a pickle, and a pickle is a program: the digest is compared before the first byte is interpreted, and
    no more than four harmless names are understood.

    Args:
        sha256: hexadecimal digest that the file must have.

    Raises:
        TouchlineError: the file is missing, has another digest, or is not a whole weight file of this format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TouchlineError(f"{path} cannot be read ({error.strerror}): put the weight file there") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise TouchlineError(f"{path} has sha256 {found}, not {sha256}: it is damaged or another file; replace it")
    try:
        return _tensors(io.BytesIO(content))
    except Exception as error:
        # A damaged or hostile pickle can fail in any way there is; to a person they are all one.
        raise TouchlineError(f"{path} is not a readable torch weight file ({one_line(error)}): replace it") from None


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """Where in a storage a tensor lies; the values come later in the file. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def cut_from(self, values: np.ndarray) -> np.ndarray:
        if len(self.shape) != len(self.strides) or min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError("a tensor has an impossible shape")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape or last >= len(values) or math.prod(self.shape) > len(values):
            raise ValueError(f"a tensor reaches beyond its storage {self.storage.key}")
        bytes_apart = tuple(stride * values.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, bytes_apart, writeable=False)


def _rebuild(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_about_gradients: object
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    return _Tensor(storage, offset, shape, strides)


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


# The one in Python: the one in C makes room for the place in its memo that a file names, and if that is gigabytes.
class _Unpickler(pickle._Unpickler):
    # Nor does any weight file hold a bytearray, for which room is made before a byte of it is read.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ValueError(f"it asks for {module}.{name}, which no weights need") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, count, view = pid
        if kind != "storage" or dtype not in ("<f4", "<i8") or view is not None:
            raise ValueError("it holds something other than plain storages")
        return _Storage(key, np.dtype(dtype), count)


def _tensors(file: io.BytesIO) -> dict[str, np.ndarray]:
    magic, protocol, machine = (_Unpickler(file).load() for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not machine["little_endian"]:
        raise ValueError("it is not of the format before torch 1.6, little-endian")
    state = _Unpickler(file).load()
    if not all(isinstance(tensor, _Tensor) for tensor in state.values()):
        raise ValueError("its state dict holds something other than tensors")
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    keys = _Unpickler(file).load()
    if sorted(keys) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    values = {key: _values(file, storages[key]) for key in keys}
    if file.read(1):
        raise ValueError("it goes on after its last storage")
    return {name: tensor.cut_from(values[tensor.storage.key]) for name, tensor in state.items()}


def _values(file: io.BytesIO, storage: _Storage) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little")
    if count != storage.count:
        raise ValueError(f"storage {storage.key} should hold {storage.count} values and says {count}")
    content = file.read(count * storage.dtype.itemsize)
    if len(content) != count * storage.dtype.itemsize:
        raise ValueError(f"it ends within storage {storage.key}")
    return np.frombuffer(content, storage.dtype)
