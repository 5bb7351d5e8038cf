"""Reads PyTorch's checkpoint formats without PyTorch, and runs nothing that is in them.

A checkpoint is a pickle, which is a program: it names Python objects and calls them. The reader here knows
the few names and operations that weights need, and has an inert stand-in for each; it refuses all others. Two formats
exist. Since PyTorch 1.6, a checkpoint is an uncompressed zip with the pickle in ``NAME/data.pkl`` and the bytes of
each storage in ``NAME/data/KEY``. Before (and with ``_use_new_zipfile_serialization=False``) it is a number, a version
and the sizes of integers, each pickled; the pickle; the pickled list of storage keys; each storage's length and bytes.

A tensor in the pickle is a view of a storage (offset, sizes, strides in elements). A storage is read only when one
of its tensors is read, so an optimiser's state costs nothing. No size that a file names is believed before it is
compared with the file's own: what is read takes no more memory than a small multiple of that.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
import os
import pickletools
import struct
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

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
MAX_PICKLE = 2**26  # bytes; those of the largest published checkpoints have 2^23, with their optimiser
MAX_WORK = 1_000_000  # operations, which take 2 to 5 s and up to 0.2 GB; a tensor takes about 25
MAX_LINE = 1000  # bytes of a line in a pickle, which is a module's or a class's name
MAX_NAME = 500  # characters of a key; a dictionary leaves out longer ones
MAX_DIMENSIONS = 32
MAX_DIRECTORY = 2**23  # bytes of a zip file's directory; a storage takes about 100
MAX_SHARED = 4  # times as many bytes as the file has, that its tensors may take if they share storages


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
    """The stand-in for an object that no weight depends on; the reader does nothing with it.

    Attributes:
      state: the attributes that a pickle sets on the object, such as those of an argparse.Namespace.
    """

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    if not isinstance(numbers, tuple | list) or len(numbers) > MAX_DIMENSIONS:
        raise RefusedError(f"a tensor whose shape is not at most {MAX_DIMENSIONS} numbers")
    return tuple(numbers)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    shape, strides = _size(shape), _size(strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise RefusedError("a tensor that is not a view of a storage")
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
        raise RefusedError("a tensor of negative or fractional size")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
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
    # Python's own types, as parts of such objects. torch.save writes protocol 2, which has Python 2's names of them.
    **{
        f"{builtins}.{name}": Inert
        for builtins in ("builtins", "__builtin__")
        for name in (
            "set", "frozenset", "dict", "list", "tuple", "int", "long", "float", "complex", "bool", "str", "unicode",
            "bytearray",
        )
    },
    # Python's standard library: MultiStepLR's milestones are a Counter; times and records of a run.
    **{f"collections.{name}": Inert for name in ("Counter", "deque", "defaultdict")},
    **{f"datetime.{name}": Inert for name in ("datetime", "timedelta")},
    "types.SimpleNamespace": Inert,
    # Lightning's checkpoints: hyperparameters, whose type is omegaconf's in many scripts, and the state of callbacks.
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


ALLOWED: Mapping[str, Any] = types.MappingProxyType(_NAMES)

# The operations that put a value on the stack: the one in the pickle, or what the function here returns.
ATOMS: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
    {
        **{f"BININT{size}": int for size in ("", "1", "2")},
        **{f"{short}BINUNICODE": str for short in ("", "SHORT_")},
        **{f"{short}BINSTRING": str for short in ("", "SHORT_")},  # Python 2's byte strings, as Latin-1
        **{f"{short}BINBYTES": bytes for short in ("", "SHORT_")},
        **{"BINUNICODE8": str, "BINBYTES8": bytes, "BYTEARRAY8": bytes, "BINFLOAT": float, "LONG1": int},
        **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
        **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert},
    }
)


class Unpickler:
    """The machine that a pickle is a program for, with the operations that PyTorch's checkpoints need and no others.

    It cannot call or change anything of ours: a global name is an entry of ALLOWED, which it calls only through
    :meth:`_call`, and it fills only dictionaries and lists that it made itself. Its work and memory are bounded by
    MAX_PICKLE and MAX_WORK, whatever sizes the bytes name: the time of an operation grows at most with the number of
    objects on its stack. What could take longer is left out: sets, and keys of dictionaries that are not names or
    numbers (a tuple of one tuple twice, 60 deep, has 2^60 items to hash).

    Attributes:
      storages: the storages that it met, by key.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = _Limited(file)
        self._left = MAX_WORK
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """The next pickle of the file.

        Raises:
          RefusedError: it asks for what weights do not need, or for too much.
        """
        stack: list[Any] = []
        marked: list[list[Any]] = []  # the stacks below the marks
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", self._file)):
            self._work(1)
            name, arg = opcode.name, cast("Any", argument)
            if name in ATOMS:
                stack.append(ATOMS[name]() if arg is None else arg)
                continue
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "STOP":
                    return stack.pop()
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    stack = marked.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "TUPLE" | "FROZENSET":
                    items, stack = stack, marked.pop()
                    stack.append(tuple(items) if name == "TUPLE" else Inert())
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items, stack = stack, marked.pop()
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _update(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, marked.pop()
                    _update(stack[-1], items)
                case "GLOBAL":
                    stack.append(_allowed(arg.replace(" ", ".")))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    if not isinstance(attribute, str) or not isinstance(module, str):
                        raise RefusedError("a global name that is not a text")
                    stack.append(_allowed(f"{module}.{attribute}"))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "NEWOBJ_EX":
                    _, args, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Inert) and isinstance(state, dict):
                        stack[-1].state = state
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case _:
                    raise RefusedError(f"its pickle has the operation {name}, which PyTorch does not write")
        raise AssertionError("genops raises ValueError if there is no STOP")

    def _work(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise RefusedError(f"its pickle has more than {MAX_WORK} operations, as no checkpoint needs")

    def _call(self, function: Any, args: Any) -> Any:
        """What an allowed name makes of its arguments."""
        if not isinstance(args, tuple):
            raise RefusedError("a call without arguments")
        if function is Inert:
            return Inert()
        if function is collections.OrderedDict:
            made: dict[Any, Any] = collections.OrderedDict()
            for pair in args[0] if args and isinstance(args[0], list) else ():  # as Python 2 wrote it
                self._work(1)
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise RefusedError("a dictionary of something else than pairs")
                _update(made, pair)
            return made
        if function in (_tensor, _parameter, _size) and len(args) <= MAX_DIMENSIONS:
            return function(*args)
        raise RefusedError("a call of something else than PyTorch's functions")

    def _storage(self, pid: Any) -> Storage:
        """A storage, from ('storage', type, key, device, number of elements[, view])."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
            raise RefusedError("a persistent id that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedError("a view of a storage, as PyTorch before 0.4 wrote it")
        if not isinstance(pid[2], str | int) or not isinstance(pid[4], int) or pid[4] < 0:
            raise RefusedError("a storage of negative or fractional size")
        storage = Storage(str(pid[2]), pid[1].dtype, pid[4])
        return self.storages.setdefault(storage.key, storage)


class _Limited:
    """The first MAX_PICKLE bytes of what is left of a file; no `read` takes memory for bytes that are not there."""

    def __init__(self, file: IO[bytes]) -> None:
        here, end = file.tell(), file.seek(0, os.SEEK_END)
        file.seek(here)
        self._file, self._done, self._size = file, 0, min(end - here, MAX_PICKLE)

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        return self._count(self._file.read(min(size, self._size - self._done)))

    def readline(self) -> bytes:
        """A line, at most MAX_LINE bytes of it."""
        return self._count(self._file.readline(min(MAX_LINE, self._size - self._done)))

    def _count(self, data: bytes) -> bytes:
        self._done += len(data)
        if self._done >= MAX_PICKLE:
            raise RefusedError(f"its pickle has {MAX_PICKLE >> 20} MiB or more, as no checkpoint needs")
        return data


def _allowed(name: str) -> Any:
    try:
        return ALLOWED[name]
    except KeyError:
        advice = ""
        kind = name.rpartition(".")[2]
        if kind[:1].isupper():  # a class: torch.save(model) keeps objects, and not only their weights
            advice = (
                "; if it holds a whole model, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
            )
        raise RefusedError(f"its pickle asks for '{name}', which weights do not need{advice}") from None


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Inert):
        raise RefusedError("items for something else than a list")


def _update(target: Any, items: Sequence[Any]) -> None:
    """Adds keys and values in turn to a dictionary, but for those whose keys cannot be names of weights."""
    if isinstance(target, Inert):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise RefusedError("keys for something else than a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, int) or (isinstance(key, str) and len(key) <= MAX_NAME):
            target[key] = value


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An unpickled checkpoint.

    Attributes:
      tree: the saved object, with `Tensor` and `Inert` in place of tensors and other objects.
      read: the function storage -> its bytes, if the file has as many.
      size: the size of the file in bytes.
    """

    tree: Any
    read: Callable[[Storage], bytes]
    size: int

    def arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Reads tensors' numbers, each storage once.

        Raises:
          RefusedError: a storage is cut short, a tensor reaches beyond its storage, or they share so much that
            copies of them would be out of proportion to the file.
        """
        total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
        if total > MAX_SHARED * self.size:
            raise RefusedError(f"its tensors have {_short(total)} bytes, the file {self.size}: they repeat its numbers")
        numbers: dict[str, np.ndarray] = {}
        for storage in (t.storage for t in tensors.values()):
            if storage.key not in numbers:
                numbers[storage.key] = np.frombuffer(self.read(storage), storage.dtype)
        return {name: view(tensor, numbers[tensor.storage.key]) for name, tensor in tensors.items()}


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
            with path.open("rb") as file, zipfile.ZipFile(cast("IO[bytes]", directory := _Directory(file))) as archive:
                directory.read_once = True
                yield _open_zip(archive, path.stat().st_size)
        else:
            with path.open("rb") as file:
                yield _open_legacy(file, path.stat().st_size)
    except RefusedError as e:
        raise CheckpointError(f"{path}: refused: {_one_line(e).partition(': ')[2]}") from None
    except CheckpointError:
        raise
    except Exception as e:  # unpickling damaged bytes raises almost anything
        raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint ({_one_line(e)})") from None


class _Directory:
    """A zip file, of which `zipfile` reads the whole directory and makes an object of each entry when it opens it.

    Attributes:
      read_once: whether the directory is read; before, no more than MAX_DIRECTORY bytes are.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.read_once = file, False
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if size > MAX_DIRECTORY and not self.read_once:
            raise RefusedError(
                f"a zip file whose directory has {size} bytes, more than the {MAX_DIRECTORY} of a checkpoint"
            )
        return self._file.read(size)


def _one_line(e: Exception) -> str:
    text = " ".join(f"{type(e).__name__}: {str(e)[: 9 * MAX_MESSAGE]}".split())  # the pieces of all would take memory
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."


def _short(number: int) -> str:
    """A whole number that may have thousands of digits, for a message."""
    return str(number) if number < 2**63 else "more than 2^63"


def _open_zip(archive: zipfile.ZipFile, size: int) -> Checkpoint:
    members = archive.infolist()
    pickles = [member.filename for member in members if member.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("a zip file, but not a PyTorch checkpoint: there is no data.pkl in it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise RefusedError("a compressed zip file, which PyTorch does not write: unpack it and zip it with -0")
    if sum(max(member.file_size, member.compress_size) for member in members) > size:
        raise RefusedError(f"a zip file whose parts have more bytes than the file, {size}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.NameToInfo and archive.read(f"{root}byteorder") != b"little":
        raise RefusedError("written on a big-endian machine")
    tree = Unpickler(io.BytesIO(archive.read(pickles[0]))).load()

    def read(storage: Storage) -> bytes:
        name = f"{root}data/{storage.key}"
        _require_size(storage, archive.getinfo(name).file_size)
        return archive.read(name)

    return Checkpoint(tree, read, size)


def _require_size(storage: Storage, found: int) -> None:
    wanted = storage.numel * storage.dtype.itemsize
    if found != wanted:
        raise RefusedError(f"storage {storage.key} has {found} bytes, not {_short(wanted)}: cut short?")


def _open_legacy(file: IO[bytes], size: int) -> Checkpoint:
    if Unpickler(file).load() != LEGACY_MAGIC or Unpickler(file).load() != LEGACY_VERSION:
        raise RefusedError("a pickle, but not a PyTorch checkpoint")
    if not Unpickler(file).load()["little_endian"]:
        raise RefusedError("written on a big-endian machine")
    unpickler = Unpickler(file)
    tree, keys = unpickler.load(), Unpickler(file).load()
    starts: dict[str, int] = {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RefusedError("its storages are not listed by name")
    for key in keys:
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.numel:
            raise RefusedError(f"storage {key} has {numel} elements, not {_short(storage.numel)}: damaged?")
        starts[key] = file.tell()
        file.seek(numel * storage.dtype.itemsize, os.SEEK_CUR)

    def read(storage: Storage) -> bytes:
        wanted = storage.numel * storage.dtype.itemsize
        _require_size(storage, min(wanted, size - starts[storage.key]))
        file.seek(starts[storage.key])
        return file.read(wanted)

    return Checkpoint(tree, read, size)


def view(tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """A tensor as a view of its storage's numbers, without a copy.

    Raises:
      RefusedError: the tensor reaches beyond the storage.
    """
    if 0 in tensor.shape:
        return np.empty(tensor.shape, numbers.dtype)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= numbers.size:
        raise RefusedError(f"a tensor reaches to element {_short(last)} of a storage of {numbers.size}")
    sizes = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * numbers.itemsize if n > 1 else 0 for n, stride in sizes]  # that of one number may be anything
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
