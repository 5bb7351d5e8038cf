"""Reads PyTorch's checkpoint formats without PyTorch, and runs nothing that is in them.

A checkpoint is a pickle, which is a program: it names Python objects and calls them. The reader here knows
the few names that weights need, and has an inert stand-in for each; it refuses all other names. Two formats
exist. Since PyTorch 1.6, a checkpoint is an uncompressed zip with the pickle in ``NAME/data.pkl`` and the bytes of
each storage in ``NAME/data/KEY``. Before (and with ``_use_new_zipfile_serialization=False``) it is a number, a version
and the sizes of integers, each pickled; the pickle; the pickled list of storage keys; each storage's length and bytes.

A tensor in the pickle is a view of a storage (offset, sizes, strides in elements). A storage is read only when one
of its tensors is read, so an optimiser's state costs nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from crate_jax.errors import CheckpointError

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"

DTYPES = {
    "Float": np.dtype("<f4"),
    "Double": np.dtype("<f8"),
    "Half": np.dtype("<f2"),
    "BFloat16": np.dtype(jnp.bfloat16),
    "Long": np.dtype("<i8"),
    "Int": np.dtype("<i4"),
    "Short": np.dtype("<i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype("?"),
}
DTYPE_NAMES = (
    "float32 float float64 double float16 half bfloat16 int64 long int32 int int16 short int8 uint8 bool".split()
)


MAX_MESSAGE = 200  # characters; a message may hold names from a damaged file


class RefusedError(Exception):
    """The file asks for something that the reader refuses."""


@dataclasses.dataclass(frozen=True)
class StorageType:
    """The stand-in for a class such as torch.FloatStorage."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Storage:
    """A block of `numel` numbers of which tensors are views; not read yet."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """The stand-in for an object that no weight depends on; it accepts every operation and does nothing.

    `vars` returns the attributes that a pickle sets on it, such as those of an argparse.Namespace.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignores `value`."""

    def extend(self, values: Any) -> None:
        """Ignores `values`."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise RefusedError("a tensor that is not a view of a storage")
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
        raise RefusedError("a tensor of negative or fractional size")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in DTYPES.items()},
    "torch.storage.UntypedStorage": StorageType(np.dtype("u1")),
    **{f"torch.{name}": Inert for name in ("device", *DTYPE_NAMES)},
    # Objects that published checkpoints keep beside their weights: arguments, configs, NumPy's numbers.
    "argparse.Namespace": Inert,
    "yacs.config.CfgNode": Inert,
    "pathlib.PosixPath": Inert,
    "numpy.dtype": Inert,
    "numpy.ndarray": Inert,
    **{f"numpy.{core}.multiarray.{name}": Inert for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    "_codecs.encode": Inert,
    **{f"{builtins}.set": Inert for builtins in ("builtins", "__builtin__")},
    # Lightning's checkpoints: hyperparameters, whose type is omegaconf's in many scripts, and the state of callbacks.
    **{f"builtins.{name}": Inert for name in ("dict", "list", "tuple", "int", "float", "str", "bool")},
    "collections.defaultdict": Inert,
    "typing.Any": Inert,
    **{
        f"omegaconf.{name}": Inert
        for name in (
            "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata",
            "nodes.AnyNode", "nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode",
        )
    },
    **{
        f"{package}.{name}": Inert
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "utilities.parsing.AttributeDict", "callbacks.model_checkpoint.ModelCheckpoint",
            "callbacks.early_stopping.EarlyStopping",
        )
    },
    **{f"{package}.utilities.data.AttributeDict": Inert for package in ("lightning_fabric", "lightning.fabric")},
}  # fmt: skip


# The unpickler in Python: the one in C allocates memory by numbers in the file (memo indices), so a few damaged
# bytes can ask for gigabytes. Speed does not matter: the pickles are small, because the tensors are not in them.
class Unpickler(pickle._Unpickler):
    """Resolves the names in ALLOWED and no others; `storages` holds the storages that it met, by key."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2's byte strings
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global name.

        Raises:
          RefusedError: the name is not in ALLOWED.
        """
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise RefusedError(f"its pickle asks for '{module}.{name}', which weights do not need") from None

    def persistent_load(self, pid: Any) -> Storage:
        """A storage, from ('storage', type, key, device, number of elements[, view]).

        Raises:
          RefusedError: `pid` has another form.
        """
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
            raise RefusedError("a persistent id that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedError("a view of a storage, as PyTorch before 0.4 wrote it")
        if not isinstance(pid[4], int) or pid[4] < 0:
            raise RefusedError("a storage of negative or fractional size")
        storage = Storage(str(pid[2]), pid[1].dtype, pid[4])
        return self.storages.setdefault(storage.key, storage)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An unpickled checkpoint.

    Attributes:
      tree: the saved object, with `Tensor` and `Inert` in place of tensors and other objects.
      read: the function storage -> its bytes.
    """

    tree: Any
    read: Callable[[Storage], bytes]

    def array(self, tensor: Tensor) -> np.ndarray:
        """Reads a tensor's numbers.

        Raises:
          RefusedError: the storage is cut short, or the tensor reaches beyond it.
        """
        storage, data = tensor.storage, self.read(tensor.storage)
        if len(data) != storage.numel * storage.dtype.itemsize:
            wanted = storage.numel * storage.dtype.itemsize
            raise RefusedError(f"storage {storage.key} has {len(data)} bytes, not {wanted}: cut short?")
        return view(tensor, np.frombuffer(data, storage.dtype))


@contextlib.contextmanager
def open_checkpoint(path: Path, start: bytes) -> Iterator[Checkpoint]:
    """Unpickles a checkpoint; tensors can be read inside the `with`.

    Args:
      path: the file.
      start: its first bytes, which tell the two formats apart.

    Raises:
      CheckpointError: the file is damaged, or refers to something that weights do not need.
    """
    try:
        if start.startswith(ZIP_START):
            with zipfile.ZipFile(path) as archive:
                yield _open_zip(archive)
        else:
            with path.open("rb") as file:
                yield _open_legacy(file)
    except RefusedError as e:
        raise CheckpointError(f"{path}: refused: {_one_line(e).partition(': ')[2]}") from None
    except CheckpointError:
        raise
    except Exception as e:  # unpickling damaged bytes raises almost anything
        raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint ({_one_line(e)})") from None


def _one_line(e: Exception) -> str:
    text = " ".join(f"{type(e).__name__}: {e}".split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."


def _open_zip(archive: zipfile.ZipFile) -> Checkpoint:
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("a zip file, but not a PyTorch checkpoint: there is no data.pkl in it")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise RefusedError("written on a big-endian machine")
    with archive.open(pickles[0]) as file:
        tree = Unpickler(file).load()
    return Checkpoint(tree, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _open_legacy(file: IO[bytes]) -> Checkpoint:
    if Unpickler(file).load() != LEGACY_MAGIC or Unpickler(file).load() != LEGACY_VERSION:
        raise RefusedError("a pickle, but not a PyTorch checkpoint")
    if not Unpickler(file).load()["little_endian"]:
        raise RefusedError("written on a big-endian machine")
    unpickler = Unpickler(file)
    tree = unpickler.load()
    starts: dict[str, int] = {}
    for key in Unpickler(file).load():
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.numel:
            raise RefusedError(f"storage {key} has {numel} elements, not {storage.numel}: damaged?")
        starts[key] = file.tell()
        file.seek(numel * storage.dtype.itemsize, 1)

    def read(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return Checkpoint(tree, read)


def view(tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """A tensor as a view of its storage's numbers, without a copy.

    Raises:
      RefusedError: the tensor reaches beyond the storage.
    """
    if 0 in tensor.shape:
        return np.empty(tensor.shape, numbers.dtype)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= numbers.size:
        raise RefusedError(f"a tensor reaches to element {last} of a storage of {numbers.size}")
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
