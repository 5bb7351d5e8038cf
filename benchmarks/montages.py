"""Makes image/mask pairs of a labelled folder: a picture is two images side by side, its mask has their classes.

    python -m benchmarks.montages --folder DIR --out PAIRS [--side 32] [--train 2000] [--test 1000]

DIR holds ``train/CLASS/*`` and ``test/CLASS/*``. An upright or level line, at a random place between 3/8 and 5/8 of the
side, cuts each picture; both parts are crops of images of any classes. So a label per image becomes a label per pixel,
without a data set of masks, and configs/segment.py reads PAIRS. A head has to find the line and the class on both sides
of it. There are no contours of objects here, so nothing follows for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from crate_jax.data.folder import FolderSource

CLASSES = 255  # the value 255 of a mask means: no class


def montage(images: list[np.ndarray], classes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puts crops of two images side by side, or one above the other.

    Args:
      images: two images, each uint8 (S, S, 3).
      classes: their classes, (2,).
      rng: draws the line, and where the crops lie in their images.

    Returns:
      The picture, uint8 (S, S, 3), and the class of each pixel, uint8 (S, S).
    """
    side = len(images[0])
    line, level = int(rng.integers(3 * side // 8, 5 * side // 8, endpoint=True)), rng.random() < 0.5
    picture, mask = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.uint8)
    for image, label, start, end in zip(images, classes, (0, line), (line, side), strict=True):
        first = int(rng.integers(0, side - (end - start), endpoint=True))
        to, of = slice(start, end), slice(first, first + end - start)
        if level:
            picture[to], mask[to] = image[of], label
        else:
            picture[:, to], mask[:, to] = image[:, of], label
    return picture, mask


def make(folder: Path, out: Path, split: str, side: int, count: int) -> None:
    """Writes `count` pairs of a split to ``out/SPLIT/images`` and ``out/SPLIT/masks``, the same ones at each call."""
    train = str(folder / "train")
    source = FolderSource(train) if split == "train" else FolderSource(str(folder / split), like=train)
    labels = source.labels
    if labels is None or source.class_names is None or len(source.class_names) > CLASSES:
        raise SystemExit(
            f"{folder / split}: has no labels, or more than {CLASSES} classes; expected a folder per class"
        )
    for part in ("images", "masks"):
        (out / split / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0 if split == "train" else 1)
    for number in range(count):
        indices = rng.integers(0, len(source), 2)
        photos = [Image.fromarray(source.read(int(i))) for i in indices]
        images = [np.asarray(ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC)) for photo in photos]
        picture, mask = montage(images, labels[indices], rng)
        Image.fromarray(picture).save(out / split / "images" / f"{number:06d}.png")
        Image.fromarray(mask).save(out / split / "masks" / f"{number:06d}.png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="labelled images, train/CLASS/* and test/CLASS/*")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the pairs")
    parser.add_argument("--side", type=int, default=32, help="height and width of a picture in pixels")
    parser.add_argument("--train", type=int, default=2000, help="number of pairs to train on")
    parser.add_argument("--test", type=int, default=1000, help="number of pairs to score on")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out={args.out}: exists already; give a new folder")
    for split, count in (("train", args.train), ("test", args.test)):
        make(args.folder, args.out, split, args.side, count)
    print(f"{args.out}: {args.train} pairs to train on, {args.test} to score on")


if __name__ == "__main__":
    main()
