"""Parquet and Arrow files as Hugging Face lays them out: repositories of the Hub, saved data sets, the cache.

Read are, with pyarrow:

* a folder of Parquet files, as the Hub has them: ``data/train-00000-of-00005.parquet``, ``train/0000.parquet``;
* what ``datasets.save_to_disk`` writes: ``dataset_dict.json``, ``train/state.json``, ``train/data-*.arrow``;
* both by the name of the data set, if it lies in Hugging Face's cache on this machine; nothing is downloaded.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crate_jax.data import decoding
from crate_jax.data.folder import files_below
from crate_jax.data.sources import (
    LABELS,
    ColumnSource,
    Request,
    candidates,
    class_numbers,
    difference,
    digest,
    first_labelled,
    label_text,
    named,
    require_all_shards,
    split_of,
)
from crate_jax.errors import DataError, some
from crate_jax.workdir.folder import expanduser, readable_set

ENDINGS = (".parquet", ".arrow")
CACHE_BYTES = 256 * 2**20  # of unpacked row groups that a process keeps


@dataclasses.dataclass(frozen=True)
class Table:
    """One file, of which the rows are not read yet.

    Attributes:
      path: the file.
      schema: pyarrow's schema.
      rows: the number of rows of each row group (Parquet) or record batch (Arrow).
    """

    path: str
    schema: Any
    rows: tuple[int, ...]

    def column(self, name: str) -> Any:
        """Reads a whole column, a pyarrow ChunkedArray.

        Raises:
          DataError: the file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.path.endswith(".parquet"):
                with pq.ParquetFile(self.path) as file:
                    return file.read([name]).column(0)
            return pa.chunked_array(_mapped(self.path, name), self.schema.field(name).type)
        except Exception as e:  # a damaged file may raise any error
            raise DataError(f"{self.path}: the column {name} cannot be read ({_one_line(e)})") from None


class TableSource(ColumnSource):
    """The images of one column of several files; files are opened again in each process.

    An image of a Parquet file costs its row group, of which each process keeps CACHE_BYTES; one of an Arrow file only
    itself.

    Args:
      tables: the files.
      column: the name of the column of images: encoded images, or structs with a field 'bytes'.
      labels: see ColumnSource.
      class_names: see ColumnSource.
      max_pixels: see ColumnSource.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        column: str,
        labels: np.ndarray | None,
        class_names: list[str],
        max_pixels: int = decoding.LARGEST,
    ):
        super().__init__(labels, class_names, max_pixels)
        self._paths = [table.path for table in tables]
        self._groups = [(file, group) for file, table in enumerate(tables) for group in range(len(table.rows))]
        self._ends = np.cumsum([rows for table in tables for rows in table.rows], dtype=np.int64)
        self._firsts = np.cumsum([0, *(sum(table.rows) for table in tables)], dtype=np.int64)  # of each file
        self._column = column
        self._opened = _Opened()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=_Opened())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> Image.Image:
        """See Source.open."""
        number = int(np.searchsorted(self._ends, index, "right"))
        file, group = self._groups[number]
        try:
            rows = self._opened.rows(self._paths[file], group, self._column)
            value = rows[int(index) - int(self._ends[number]) + len(rows)].as_py()
        except Exception as e:  # a damaged file may raise any error
            raise decoding.DecodeError(f"its group of rows, {group}, cannot be read ({_one_line(e)})") from e
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            elsewhere = isinstance(value, dict) and value.get("path")
            raise decoding.DecodeError(f"holds only the path {elsewhere}" if elsewhere else "holds no image")
        return decoding.open_image(data, self._max_pixels)

    def name(self, index: int) -> str:
        """See Source.name."""
        file = int(np.searchsorted(self._firsts, index, "right")) - 1
        return f"{os.path.basename(self._paths[file])}[{index - int(self._firsts[file])}]"

    def fingerprint(self) -> str:
        """See Source.fingerprint."""
        files = [(os.path.basename(path), os.stat(path).st_size) for path in self._paths]
        return digest(files, self._ends, self._column, self._labels, self.class_names)


class _Opened:
    """What one process holds of the files: all maps of Arrow files, and the row groups of Parquet files used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[str, list[Any]] = {}
        self._held: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._bytes = 0

    def rows(self, path: str, group: int, column: str) -> Any:
        """Returns the column's rows of one row group or record batch, a pyarrow array."""
        if path.endswith(".arrow"):
            with self._lock:
                if path not in self._mapped:
                    self._mapped[path] = _mapped(path, column)
            return self._mapped[path][group]
        with self._lock:
            if (path, group) in self._held:
                self._held.move_to_end((path, group))
                return self._held[path, group]
        found = _row_group(path, group, column)  # without the lock: other threads read other groups meanwhile
        with self._lock:
            if (path, group) not in self._held:
                self._held[path, group] = found
                self._bytes += found.nbytes
            while self._bytes > CACHE_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found


def _row_group(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, [column], use_threads=False).column(0)


def _batches(path: str) -> tuple[Any, list[Any]]:
    """Maps an Arrow file, a stream (as `datasets` writes it) or with an index; returns schema and record batches."""
    import pyarrow as pa

    source = pa.memory_map(path)
    if source.read_at(6, 0) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    stream = pa.ipc.open_stream(source)
    return stream.schema, list(stream)


def _mapped(path: str, column: str) -> list[Any]:
    """Maps a column of an Arrow file, one array per record batch, and checks that no offset lies outside."""
    arrays = [batch.column(column) for batch in _batches(path)[1]]
    for array in arrays:
        array.validate(full=True)
    return arrays


def _table(path: Path) -> Table:
    """Reads a file's schema and how its rows are grouped.

    Raises:
      DataError: the file is damaged or cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                groups = range(file.metadata.num_row_groups)
                return Table(str(path), file.schema_arrow, tuple(file.metadata.row_group(g).num_rows for g in groups))
        schema, batches = _batches(str(path))
        return Table(str(path), schema, tuple(batch.num_rows for batch in batches))
    except Exception as e:  # a damaged file may raise any error
        raise DataError(f"{path}: damaged, cut short or not a {path.suffix} file ({_one_line(e)})") from None


def open_tables(path: str, request: Request) -> TableSource | None:
    """Opens the training or the evaluation split of a data set as Hugging Face stores it.

    Args:
      path: the folder, one file, or the name of a data set in Hugging Face's cache, such as NAME, OWNER/NAME and
        OWNER/NAME/CONFIGURATION.
      request: what is asked for. The column of images 'auto' is the only one that the file's metadata, or else its
        type, call so; that of labels the only one that the metadata call so, or else one of LABELS.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: there is no such data set; a shard is missing or damaged; the columns of images and labels are not
        known; or the files of the splits number their classes differently.
    """
    root = _root(path)
    files = _splits(root)
    chosen = candidates(list(files), request)
    if not chosen:
        return None
    tables = {name: [_table(file) for file in files[name]] for name in chosen}
    for name, found in tables.items():
        if not any(sum(table.rows) for table in found):
            raise DataError(f"{root}: split {name}: has no rows")
    first = tables[chosen[0]][0]
    features = _features(first)
    image = _image_column(first, features, request.image_column)
    label = _label_column(first, features, request.label_column)
    for table in (table for found in tables.values() for table in found):
        lacking = [column for column in (image, label) if column and column not in table.schema.names]
        if lacking:
            raise DataError(f"{table.path}: lacks the column {lacking[0]} that {os.path.basename(first.path)} has")
    labels: Mapping[str, np.ndarray | None] = {}
    class_names: list[str] = []
    if label:
        names = features.get(label, {}).get("names")
        there = tables | {name: [_table(file) for file in files[name]] for name in files if name not in tables}
        if isinstance(names, list):
            _require_names(first, names, itertools.chain.from_iterable(there.values()), label)
        else:  # the classes are those of all splits
            tables = there
        columns = {f"{root}: {label} of {name}": _labels(found, label) for name, found in tables.items()}
        numbers, class_names = class_numbers(columns)
        labels = dict(zip(tables, numbers.values(), strict=True))
        if isinstance(names, list):
            class_names = named(f"{root}: {label}", class_names, names)
    return first_labelled(
        TableSource(tables[name], image, labels.get(name), class_names, request.max_pixels) for name in chosen
    )


def _require_names(first: Table, names: list[Any], tables: Iterable[Table], label: str) -> None:
    """Checks that a number of the column `label` stands for the same class in all files that name the classes.

    Raises:
      DataError: a file has other names, or the same ones in another order.
    """
    for table in tables:
        theirs = _features(table).get(label, {}).get("names")
        if isinstance(theirs, list) and (fault := difference(names, theirs)):
            raise DataError(
                f"{first.path} and {table.path}: the columns {label} number different classes: {fault}; cast both to "
                "one ClassLabel, or go without labels: config.data.label_column=''"
            )


def _labels(tables: Sequence[Table], column: str) -> np.ndarray:
    """Returns a column of labels of a split; -1 where a number is missing."""
    import pyarrow as pa

    parts = []
    for table in tables:
        values = table.column(column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_integer(values.type):
            values = values.fill_null(-1)
        for texts, binary in ((pa.string(), pa.binary()), (pa.large_string(), pa.large_binary())):
            if values.type == texts:
                values = values.cast(binary)  # pyarrow does not check that texts are UTF-8
        array = values.to_numpy()
        if array.dtype == object and not values.null_count and not pa.types.is_nested(values.type):
            where = f"{table.path}: {column}"
            array = np.array([label_text(v, where) if isinstance(v, bytes) else str(v) for v in array], str)
        parts.append(array)
    return np.concatenate(parts)


def _features(table: Table) -> dict[str, dict[str, Any]]:
    """Returns what `datasets` has written into a file about its columns; nothing if it did not write the file."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _image_column(table: Table, features: Mapping[str, Mapping[str, Any]], wanted: str) -> str:
    import pyarrow as pa

    def may_be(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and may_be(kind.field(i).type) for i in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    possible = [field.name for field in table.schema if may_be(field.type)]
    found = [name for name in possible if features.get(name, {}).get("_type") == "Image"] or possible
    if wanted != "auto":
        found = [wanted] if wanted in possible else []
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{table.path}: has several columns of images; set config.data.image_column to one of {found}")
    columns = some([f"{field.name} ({field.type})" for field in table.schema], ", ")
    raise DataError(
        f"{table.path}: has no column {'of images' if wanted == 'auto' else repr(wanted)} whose values are encoded "
        f"images or structs with a field bytes; its columns are {columns}"
    )


def _label_column(table: Table, features: Mapping[str, Mapping[str, Any]], wanted: str) -> str:
    names = table.schema.names
    if wanted != "auto":
        if wanted and wanted not in names:
            raise DataError(
                f"{table.path}: has no column {wanted!r}, which config.data.label_column names; it has "
                f"{some(names, ', ')}"
            )
        return wanted
    found = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    known = [name for name in LABELS if name in (found or names)]
    if len(found) > 1 and not known:
        raise DataError(
            f"{table.path}: has several columns of labels; set config.data.label_column to one of {found}, or to '' "
            "for none"
        )
    return (known or found or [""])[0]


def _root(path: str) -> Path:
    """Returns the folder or file of a data set that is given by its path or its name.

    Raises:
      DataError: there is neither.
    """
    given = readable_set(path)
    if given.exists():
        return given
    home = Path(os.environ.get("HF_HOME") or expanduser("~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    parts = path.split("/")
    for count in (2, 1):
        owned, rest = parts[:count], parts[count:]
        snapshots = hub / f"datasets--{'--'.join(owned)}" / "snapshots"
        places = [*_latest(snapshots), prepared / "___".join(owned)]
        for place in places:
            if place.joinpath(*rest).is_dir() and ".." not in parts:
                return place.joinpath(*rest)
    raise DataError(
        f"config.data.source='hf:{path}': neither a path nor a data set in Hugging Face's cache, {hub} or {prepared}; "
        f"download it with: hf download --repo-type dataset {path}"
    )


def _latest(snapshots: Path) -> list[Path]:
    """Returns the snapshot that the branch main was at when it was downloaded; else the newest, if there is one."""
    main = snapshots.parent / "refs" / "main"
    if main.is_file() and re.fullmatch(r"[0-9a-f]{40}", revision := main.read_text("utf-8", "replace").strip()):
        if (snapshots / revision).is_dir():
            return [snapshots / revision]
    found = [folder for folder in snapshots.glob("*") if folder.is_dir()]
    return [max(found, key=lambda folder: folder.stat().st_mtime)] if found else []


def _splits(root: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, in the order of their rows.

    Raises:
      DataError: there are none, shards are missing, or there are several data sets.
    """
    if root.is_file():
        return {"train": [root]}
    try:
        if (root / "dataset_dict.json").is_file():
            names = json.loads((root / "dataset_dict.json").read_text())["splits"]
            return {name: _saved(root / name) for name in names}
        if (root / "state.json").is_file():
            return {"train": _saved(root)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{root}: not what datasets.save_to_disk writes ({_one_line(e)})") from None
    paths = files_below(root, lambda name: name.endswith(ENDINGS) and not name.startswith("cache-"))
    if not paths:
        raise DataError(f"{root}: holds no .parquet and no .arrow file")
    found: dict[str, list[Path]] = {}
    folders: dict[str, set[Path]] = {}
    for path in paths:
        name, folder = split_of(path.relative_to(root))
        found.setdefault(name, []).append(path)
        folders.setdefault(name, set()).add(folder)
    for name, files in found.items():
        if len(folders[name]) > 1:
            several = some(sorted(str(root / folder) for folder in folders[name]), ", ")
            raise DataError(f"{root}: holds several configurations; set config.data.source to hf: and one of {several}")
        require_all_shards(name, files)
    return found


def _saved(folder: Path) -> list[Path]:
    """Returns the files of a split that `datasets.save_to_disk` has written."""
    return [
        folder / os.path.basename(file["filename"])
        for file in json.loads((folder / "state.json").read_text())["_data_files"]
    ]


def _one_line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
