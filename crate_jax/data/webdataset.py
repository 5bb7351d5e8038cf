"""Shards of WebDataset: plain tar files, of which an index gives every image at random; no shard is unpacked.

A sample is what has the same path up to the first dot of its file name: ``000017.jpg`` with ``000017.cls`` or
``000017.json``, which need not lie together. Headers are read once; the index is kept in the user's cache folder if
that can be written to.
"""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from crate_jax.data import shards, tar
from crate_jax.data.folder import EXTENSIONS, files_below, say_once
from crate_jax.data.sources import LABELS, Request, candidates, class_numbers, first_labelled, label_text, split_of
from crate_jax.errors import MAX_LISTED, DataError, some
from crate_jax.parallel import distributed
from crate_jax.workdir.folder import readable_set

IMAGES = ("jpg", "jpeg", "png", "webp")
CLASS = "cls"
PACKED = re.compile(r"\.t.*gz$")
MAX_LABEL_BYTES = 2**20  # of a file that holds a sample's label

log = logging.getLogger(__name__)


def open_shards(pattern: str, request: Request) -> tar.TarSource | None:
    """Opens the training or the evaluation split of WebDataset's shards.

    Args:
      pattern: a folder of .tar files, in it or in sub-folders; or their paths, with {000000..000009}, {train,val} or *.
        The split is told by the name of the file, or else of its folder.
      request: what is asked for. The column of images is the ending of their names; 'auto': one of IMAGES. That of
        labels is the ending of the files of labels, or a field of the .json files; 'auto': CLASS, or else one of LABELS
        in the .json files.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: a shard is missing, compressed, cut short or damaged; no sample has an image; or a sample has several
        images, or no label though others have one.
    """
    by_split: dict[str, list[Path]] = {}
    root, paths = _shards(pattern)
    for path in paths:
        by_split.setdefault(split_of(path.relative_to(root))[0], []).append(path)
    chosen = candidates(list(by_split), request)
    if not chosen:
        return None
    beside = sum(not path.name.startswith(".") for path in paths[0].parent.glob("*.tar"))
    if request.split == "train" and len(paths) == 1 < beside and distributed.first():
        # A shell takes the last of several flags.
        log.warning("%s: only this one of %d shards is read; a pattern with {..} needs quotes", paths[0], beside)
    indices = {name: _index(found, request) for name, found in by_split.items()}
    columns = {f"{pattern}: labels of {name}": index.labels for name, index in indices.items() if len(index.labels)}
    numbers, class_names = class_numbers(columns) if columns else ({}, [])
    return first_labelled(
        tar.TarSource(
            by_split[name],
            indices[name],
            numbers.get(f"{pattern}: labels of {name}"),
            class_names,
            request.max_pixels,
        )
        for name in chosen
    )


def _shards(pattern: str) -> tuple[Path, list[Path]]:
    """Returns the folder below which names tell the split, and the shards in the order of their names.

    Raises:
      DataError: there are none, or one that the pattern names is missing.
    """
    given = readable_set(pattern)
    if not given.is_dir():
        return shards.named_shards(str(given))
    found = files_below(given, lambda name: name.endswith(".tar"))
    if not found:
        packed = some(sorted(path.name for path in files_below(given, lambda name: bool(PACKED.search(name)))), ", ")
        hint = f", only {packed}: unpack them with gunzip, as images are read at random" if packed else ""
        raise DataError(f"{given}: holds no .tar file{hint}")
    return given, found


def _index(paths: Sequence[Path], request: Request) -> tar.Index:
    columns = (request.image_column, request.label_column)
    found = shards.kept("webdataset", paths, columns, lambda: _read(paths, *columns))
    unfinished = [paths[i].name for i in found.pop("unfinished")]
    if unfinished:  # not an error: some writers forget the zeros, and all that is there can be read
        say_once(
            f"{paths[0].parent}: without the zeros that end a tar file: {some(unfinished, ', ')}; if a copy or its "
            "writer was stopped, samples are missing"
        )
    left_out, names = int(found.pop("left_out")), found.pop("left_out_names").tolist()
    if left_out:
        names += [""] * (left_out - len(names))
        say_once(
            f"{paths[0].parent}: left out {left_out} image{'s' * (left_out > 1)} of an unknown sample: "
            f"{some(names, ', ')}; a sample's key ends at the first dot of the name, and its image ends in "
            f"{' or '.join(_endings(request.image_column))} (config.data.image_column)"
        )
    return tar.Index(**found)


def _endings(image_column: str) -> tuple[str, ...]:
    return IMAGES if image_column == "auto" else (image_column.lower().removeprefix("."),)


def _samples(
    path: Path, images: Collection[str], labels: Collection[str], left_out: list[str], remarks: tar.Remarks
) -> list[tuple[str, dict[str, tar.Member]]]:
    """Returns the key of each sample of a shard, the path up to the first dot of the name, and its files by the rest.

    Files of one key that lie apart, as in ``tar cf set.tar *.png *.cls``, are one sample, unless both places hold an
    image or the same ending: then they are two samples whose keys are equal.

    Args:
      path: the shard.
      images: the endings of images.
      labels: those of labels; files with other endings are left out.
      left_out: gets the names of images that are not in a sample with an image: a key that has a dot, another ending, a
        link that leads out of the shard. Masks and the like beside an image are not among them.
      remarks: see tar.members.
    """
    others: list[tuple[str, str]] = []  # images with an ending that was not asked for, after their keys

    def named() -> Iterator[tuple[str, str, tar.Member]]:
        for member in tar.members(path, remarks=remarks):
            folder, name = os.path.split(member.name)
            stem, dot, ending = name.partition(".")
            if stem and dot:
                key, ending = os.path.join(folder, stem), ending.lower()
                if ending not in images and member.name.lower().endswith(EXTENSIONS):
                    others.append((key, member.name))
                yield key, ending, member

    kept = {*images, *labels}
    samples: list[tuple[str, dict[str, tar.Member]]] = []
    latest: dict[str, dict[str, tar.Member]] = {}
    for key, group in itertools.groupby(named(), operator.itemgetter(0)):
        files = {ending: member for _, ending, member in group if ending in kept}
        held = latest.get(key, files)
        two_images = not held.keys().isdisjoint(images) and not files.keys().isdisjoint(images)
        if held is files or two_images or held.keys() & files.keys():
            samples.append((key, files))
            latest[key] = files
        else:
            held.update(files)
    whole = {key for key, files in samples if not files.keys().isdisjoint(images)}
    left_out += [name for key, name in others if key not in whole]
    left_out += [name for name in remarks.links if name.lower().endswith(EXTENSIONS)]
    return samples


def _read(paths: Sequence[Path], image_column: str, label_column: str) -> dict[str, np.ndarray]:
    """Reads the headers of all shards, and the samples' labels.

    Returns:
      The arrays of the tar.Index; ``left_out``, the number of images that are not in a sample; ``left_out_names``, the
      first of their names; ``unfinished``, the numbers of the shards that lack the zeros at their end.
    """
    endings = _endings(image_column)
    of_labels = (_label_ending(label_column), "json")
    left_out: list[str] = []
    unfinished: list[int] = []
    found: list[tuple[int, tar.Member]] = []
    labels: list[str] = []
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            remarks = tar.Remarks()
            for key, sample in _samples(path, endings, of_labels, left_out, remarks):
                images = [ending for ending in sample if ending in endings]
                if len(images) > 1:
                    raise DataError(
                        f"{path}: the sample {key} has images {' and '.join(images)}; set config.data.image_column to "
                        "one"
                    )
                if not images:
                    continue
                found.append((number, sample[images[0]]))
                label = _label(file.fileno(), path, key, sample, label_column)
                if label is not None:
                    labels.append(label)
                if len(labels) not in (0, len(found)):
                    fault = "no label, though others have one" if label is None else "a label, though others have none"
                    raise DataError(
                        f"{path}: the sample {key} at offset {sample[images[0]].start} has {fault}; "
                        "config.data.label_column='' goes without labels"
                    )
            unfinished += [number] * remarks.unfinished
    if not found:
        raise DataError(f"{paths[0]}: no image in {len(paths)} shards; its endings are to be {', '.join(endings)}")
    whole = all(re.fullmatch(r"-?\d{1,9}", label) for label in labels)
    index = tar.Index.of(found, np.array([int(label) for label in labels], np.int64) if whole else np.array(labels))
    amiss = {
        "left_out": np.array(len(left_out)),
        "left_out_names": np.array(left_out[:MAX_LISTED]),
        "unfinished": np.array(unfinished, np.int32),
    }
    return vars(index) | amiss


def _label_ending(label_column: str) -> str:
    return CLASS if label_column == "auto" else label_column.lower().removeprefix(".")


def _label(file: int, path: Path, key: str, sample: dict[str, tar.Member], wanted: str) -> str | None:
    """Returns the label of a sample as a text; None if it has none.

    Raises:
      DataError: it is empty, too long, damaged or not UTF-8.
    """
    ending = _label_ending(wanted)
    member = sample.get(ending) or sample.get("json")
    if not wanted or member is None:
        return None
    if member.size > MAX_LABEL_BYTES:
        raise DataError(f"{path}: {member.name} at offset {member.start}: {member.size} bytes are no label")
    where, content = f"{path}: {member.name} at offset {member.start}", os.pread(file, member.size, member.start)
    if ending in sample:
        return _required(label_text(content.strip(), where).strip(), where)
    try:
        fields = json.loads(content.decode("utf-8", "surrogateescape"))  # other fields than the label may be anything
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: {key}.json at offset {member.start} is damaged ({e})") from None
    for field in (CLASS, *LABELS) if wanted == "auto" else (wanted,):
        value = fields.get(field) if isinstance(fields, dict) else None
        if isinstance(value, int | str):
            return _required(label_text(str(value), where), where)
    return None


def _required(label: str, where: str) -> str:
    if not label.strip():
        raise DataError(f"{where}: the label is empty; write one, or go without labels: config.data.label_column=''")
    return label
