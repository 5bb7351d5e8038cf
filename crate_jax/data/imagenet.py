"""ImageNet-1k (ILSVRC 2012) in the tar files of its download page; nothing is unpacked.

``ILSVRC2012_img_train.tar`` holds a tar file for each class, ``n01440764.tar``, and ``ILSVRC2012_img_val.tar`` the
images ``ILSVRC2012_val_00000001.JPEG``, whose classes the development kit ``ILSVRC2012_devkit_t12.tar.gz`` tells.
Classes are numbered in the order of their WordNet numbers, and the training images have the order of their names: both
as in a folder of the unpacked images.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crate_jax.data import shards, tar
from crate_jax.data.sources import Request, candidates, class_numbers, first_labelled
from crate_jax.errors import DataError, some
from crate_jax.parallel import distributed
from crate_jax.workdir.folder import expanduser, readable_set

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
KIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # in the kit's folder `data`
CLASS = re.compile(r"n\d{8}")  # a class's WordNet number
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")

log = logging.getLogger(__name__)


def open_archives(path: str, request: Request) -> tar.TarSource | None:
    """Opens the training or the validation images.

    Args:
      path: the folder of the tar files.
      request: what is asked for; the splits are train and val. The column of labels is the file that tells the classes
        of the validation images, in the folder or elsewhere, a text with one line per image: a class, after the image's
        name or else in the order of the names; 'auto': the development kit, if it is there.

    Returns:
      The split, or None if there is no evaluation split.

    Raises:
      DataError: a tar file is missing, damaged or another one; or the classes of the validation images are not told.
    """
    root = readable_set(path)
    found = {split: root / name for split, name in ARCHIVES.items() if (root / name).is_file()}
    if not found:
        raise DataError(f"{root}: holds neither {' nor '.join(ARCHIVES.values())}")
    chosen = candidates(list(found), request)
    if not chosen:
        return None
    indices = {split: _index(archive, split) for split, archive in found.items()}
    columns = {}
    if request.label_column:
        if "train" in indices:
            columns["train"] = indices["train"].labels
        if "val" in indices and (truth := _truth(root, request.label_column)):
            columns["val"] = _labels(found["val"], indices["val"], *truth)
    if len(columns) == 2 and (unknown := np.setdiff1d(columns["val"], columns["train"]).astype(str).tolist()):
        raise DataError(f"{found['train']}: lacks classes of the validation images: {some(unknown, ', ')}")
    numbers, class_names = class_numbers(columns) if columns else ({}, [])
    return first_labelled(
        tar.TarSource([found[split]], indices[split], numbers.get(split), class_names, request.max_pixels)
        for split in chosen
    )


def _index(archive: Path, split: str) -> tar.Index:
    read = _training if split == "train" else _validation
    return tar.Index(**shards.kept("imagenet", [archive], [split], lambda: vars(read(archive))))


def _whole(archive: Path) -> list[tar.Member]:
    """Returns the files of a tar file.

    Raises:
      DataError: it is damaged or cut short, be it after a file.
    """
    remarks = tar.Remarks()
    found = list(tar.members(archive, remarks=remarks))
    if remarks.unfinished:
        raise DataError(f"{archive}: cut short, as it lacks the zeros that end a tar file; download it again")
    return found


def _training(archive: Path) -> tar.Index:
    """Reads the headers of the tar file of tar files; the labels are WordNet numbers."""
    parts = sorted(_whole(archive), key=lambda part: part.name)
    for part in parts:
        if not re.fullmatch(rf"{CLASS.pattern}\.tar", part.name):
            raise DataError(f"{archive}: holds {part.name}, where only tar files of classes such as n01440764.tar are")
    images = [(part.name, sorted(tar.members(archive, part), key=lambda image: image.name)) for part in parts]
    if not any(found for _, found in images):
        raise DataError(f"{archive}: holds no image")
    labels = np.array([name.removesuffix(".tar") for name, found in images for _ in found], "S9")
    return tar.Index.of(((0, image) for _, found in images for image in found), labels)


def _validation(archive: Path) -> tar.Index:
    """Reads the headers of the flat tar file, whose images have no labels here."""
    images = sorted((image for image in _whole(archive) if VALIDATION.search(image.name)), key=lambda image: image.name)
    if not images:
        raise DataError(f"{archive}: holds no image such as ILSVRC2012_val_00000001.JPEG")
    return tar.Index.of(((0, image) for image in images), np.zeros(0, np.int64))


def _truth(root: Path, wanted: str) -> tuple[Path, str, dict[str, str]] | None:
    """Returns the file that tells the classes of the validation images, its text, and the classes by their numbers.

    A text of the user's has the classes themselves. None if there is no kit.
    """
    path = root / (KIT if wanted == "auto" else expanduser(wanted))
    if wanted == "auto" and not path.is_file():
        if distributed.first():
            log.warning("%s: the validation images have no labels, which %s would tell", root, KIT)
        return None
    try:
        if not path.name.endswith(".tar.gz"):
            return path, path.read_text("utf-8", "replace"), {}
        with tarfile.open(path) as kit:
            files = {Path(info.name).name: info for info in kit if Path(info.name).parent.name == "data"}
            text = kit.extractfile(files[TRUTH]).read().decode()  # type: ignore[union-attr]
            return path, text, _classes(kit.extractfile(files[CLASSES]).read())  # type: ignore[union-attr]
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:  # a damaged file may raise any error
        what = " ".join(f"{type(e).__name__}: {e}".split())
        raise DataError(f"{path}: damaged, or without data/{TRUTH} and data/{CLASSES} ({what})") from None


def _classes(meta: bytes) -> dict[str, str]:
    """Returns the WordNet numbers of the classes by the numbers that the development kit gives them."""
    import scipy.io

    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
    return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}


def _labels(archive: Path, index: tar.Index, path: Path, text: str, classes: Mapping[str, str]) -> np.ndarray:
    """Returns the class of each validation image, a WordNet number, S9 (n,).

    Raises:
      DataError: the text does not tell it.
    """
    names = [index.name(i) for i in range(len(index.ends))]
    numbers = [int(VALIDATION.search(name)[1]) for name in names]  # type: ignore[index]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told: dict[int, str] = {}
    for place, line in enumerate(lines, 1):
        image, found = VALIDATION.search(line), CLASS.search(line)
        label = classes.get(line) or (found[0] if found else "")
        if label:
            told[int(image[1]) if image else place] = label
    lacking = [name for name, number in zip(names, numbers, strict=True) if number not in told]
    if lacking or len(told) > len(names):
        fault = f"not that of {some(lacking, ', ')}" if lacking else f"but there are {len(names)}"
        raise DataError(
            f"{path}: tells the class, such as n01440764, of {len(told)} images, {fault} in {archive.name}; "
            "config.data.label_column names another file, or '' to go without labels"
        )
    return np.array([told[number] for number in numbers], "S9")
