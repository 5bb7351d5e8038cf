"""The table of bad inputs (bad_inputs.toml), what it needs, and the page made of it.

    python -m tests.bad_inputs > docs/bad_inputs.md

A row says what is wrong, the command and the one line it gets; ``...`` in a line stands for what differs between
machines and versions. In a command, DIR is a fresh folder that `make` (a function of MAKERS) has filled, RUN a copy of
a finished run, QUICK and FOLDER the flags below. Commands begin with `main` or `convert`, or with variables of the
environment; those with `alone` are a shell's, in a process of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

TABLE = Path(__file__).with_name("bad_inputs.toml")
SHORT = {
    "QUICK": "--config=configs/quickstart.py:debug",
    "FOLDER": (
        "--config=configs/cifar10.py:debug --config.data.source=folder:DIR/images --config.data.image_size=8,8 "
        "--config.encoder.patch_size=2"
    ),
}
MODULES = {"main": "crate_jax.main", "convert": "crate_jax.convert"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
      group: heading it stands under.
      what: what is wrong with it.
      command: see the module's docstring.
      line: what is printed, paths under DIR and RUN shown as these.
      make: name in MAKERS; empty: DIR is empty.
      alone: run by a shell, as a process of its own.
      tolerated: the line is a warning, and the command does its work.
      slow: takes long.
    """

    group: str
    what: str
    command: str
    line: str = ""
    make: str = ""
    alone: bool = False
    tolerated: bool = False
    slow: bool = False

    @property
    def needs_run(self) -> bool:
        """Whether the command names RUN."""
        return re.search(r"\bRUN\b", self.command) is not None

    def expanded(self, folder: Path) -> str:
        """The command with QUICK, FOLDER, DIR and RUN replaced; the run is in `folder`."""
        text = self.command
        for name, flags in SHORT.items():
            text = re.sub(rf"\b{name}\b", flags, text)
        return re.sub(r"\bDIR\b", str(folder), re.sub(r"\bRUN\b", f"{folder}/run", text))

    def matches(self, printed: str) -> bool:
        """Whether a printed line is the one expected."""
        return re.fullmatch(".*".join(map(re.escape, self.line.split("..."))), printed, re.DOTALL) is not None


def rows() -> list[Row]:
    """The table."""
    return [Row(group, **row) for group, found in tomllib.loads(TABLE.read_text()).items() for row in found]


def shown(line: str, folder: Path) -> str:
    """A printed line with the row's own paths as DIR and RUN."""
    return line.replace(f"{folder}/run", "RUN").replace(str(folder), "DIR")


MAKERS: dict[str, Callable[[Path], None]] = {}


def maker(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Lists a function of MAKERS."""
    MAKERS[make.__name__] = make
    return make


def config_file(name: str, text: str | bytes) -> None:
    """A maker that writes DIR/c.py."""
    data = text if isinstance(text, bytes) else text.encode()
    MAKERS[name] = lambda folder: (folder / "c.py").write_bytes(data) and None


BASE = "from crate_jax.config import base\ndef get_config(arg=None):\n    c = base()\n    {}\n    return c\n"
config_file("config_syntax", "def get_config(:\n")
config_file("config_empty", "")
config_file("config_none", "def get_config(arg=None):\n    base = 1\n")
config_file("config_dict", "def get_config(arg=None):\n    return {'job': 'pretrain'}\n")
config_file("config_foreign", "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'lr': 3})\n")
config_file("config_raises", "def get_config():\n    return 1 / 0\n")
config_file("config_no_arg", "from crate_jax.config import base\ndef get_config():\n    return base()\n")
config_file("config_import", "import nonesuch\n")
config_file("config_misspelt", BASE.format("c.encoder.widht = 3"))
config_file("config_wrong_type", BASE.format("c.encoder.width = 'wide'"))
config_file("config_unset", BASE.format("c.encoder.width = None"))
config_file("config_deleted", BASE.format("c.unlock(); del c.encoder['width']"))
config_file("config_binary", b"\x00\xff\xfe")
config_file("config_latin", 'x = "ä"'.encode("latin-1"))


def file(name: str, data: bytes | str) -> None:
    """A maker that writes one file: `name` is 'MAKER FILE'."""
    label, where = name.split()
    MAKERS[label] = lambda folder: (
        (folder / where).write_bytes(data.encode() if isinstance(data, str) else data) and None
    )


def images(root: Path, count: int = 8, splits: tuple[str, ...] = ("train", "test"), labelled: bool = True) -> None:
    """Two classes of small images under root/images."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog") if labelled else ("",):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(folder / f"{i}.png")


def encoded(kind: str, pixels: np.ndarray | None = None, mode: str = "RGB") -> bytes:
    """An image as bytes of a file."""
    image = Image.new(mode, (12, 12)) if pixels is None else Image.fromarray(pixels)
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "empty": b"",
    "cut_png": encoded("PNG", np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8))[:-60],
    "cut_jpeg": encoded("JPEG")[:200],
    "text": b"this is not an image",
    "bomb": bomb(),
    "negative": encoded("TIFF", np.full((12, 12), -300, np.int32)),
}
ODD_IMAGES = {  # all of them fine
    "grey16.png": encoded("PNG", np.full((9, 9), 999, np.uint16)),
    "alpha.png": encoded("PNG", mode="RGBA"),
    "cmyk.jpg": encoded("JPEG", mode="CMYK"),
    "palette.gif": encoded("GIF", mode="P"),
    "png_in_truth.jpg": encoded("PNG"),
    "one_pixel.png": encoded("PNG", np.zeros((1, 1, 3), np.uint8)),
    "new\nline.png": encoded("PNG"),
    "nicht-utf8-\udcff.png": encoded("PNG"),
}


def bad_image(name: str) -> None:
    """A maker of good images and a bad one among them."""

    def make(folder: Path) -> None:
        images(folder)
        (folder / "images" / "train" / "cat" / "0.png").write_bytes(BAD_IMAGES[name])

    MAKERS[f"image_{name}"] = make


for _name in BAD_IMAGES:
    bad_image(_name)


@maker
def image_pipe(folder: Path) -> None:
    """A named pipe among the images, which nobody writes to."""
    images(folder)
    (folder / "images" / "train" / "cat" / "0.png").unlink()
    os.mkfifo(folder / "images" / "train" / "cat" / "0.png")


@maker
def image_endless(folder: Path) -> None:
    """A link to a device that never ends."""
    images(folder)
    (folder / "images" / "train" / "cat" / "0.png").unlink()
    (folder / "images" / "train" / "cat" / "0.png").symlink_to("/dev/zero")


@maker
def image_loop(folder: Path) -> None:
    """A link to itself."""
    images(folder)
    (folder / "images" / "train" / "cat" / "0.png").unlink()
    (folder / "images" / "train" / "cat" / "0.png").symlink_to("0.png")


@maker
def image_odd(folder: Path) -> None:
    """Everything that only looks wrong, a link upwards, and one file that is no image."""
    images(folder)
    for name, data in {**ODD_IMAGES, "text.png": BAD_IMAGES["text"]}.items():
        (folder / "images" / "train" / "cat" / name).write_bytes(data)
    (folder / "images" / "train" / "cat" / "up").symlink_to("..")


MAKERS["images"] = images
MAKERS["images_only_tests"] = lambda folder: images(folder, splits=("Test", "valid"))
MAKERS["images_two_trainings"] = lambda folder: images(folder, splits=("Train", "training"))
MAKERS["images_one_each"] = lambda folder: images(folder, count=1)
MAKERS["images_train_only"] = lambda folder: images(folder, splits=("train",))
MAKERS["images_unlabelled"] = lambda folder: images(folder, labelled=False)
MAKERS["images_nowhere"] = lambda folder: (folder / "images").mkdir()
file("file file", "a file, not a folder")
file("flags_with_config flags", "--config=photos\n")
file("flags_with_wrong_config flags", "--config=foto\n")
file("images_file images", "a file, not a folder")
file("weights_empty x.pth", b"")
file("weights_text x.safetensors", "hello")
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 102400000\n"
file("weights_lfs x.safetensors", LFS)
file("weights_whole x.pth", b"\x80\x02ctorchvision.models.resnet\nResNet\nq\x00)\x81q\x01}q\x02b.")
file("weights_malicious x.pth", pickle.dumps(print))
file("weights_pickle_bomb x.pth", b"\x80\x05" + b"\x96" + struct.pack("<Q", 3 << 30) + b".")
file("weights_header_bomb x.safetensors", struct.pack("<Q", 3 << 30) + b"{" + bytes(99))
file("weights_cut_zip x.pth", b"PK\x03\x04" + bytes(50))
with BytesIO() as deflated, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as bomb:
    bomb.writestr("a/data.pkl", bytes(2**20))
    bomb.close()
    file("weights_deflated x.pth", deflated.getvalue())
file("weights_cut x.safetensors", safetensors.numpy.save({"a": np.zeros((9, 9), np.float32)})[:-20])
file("weights_foreign x.safetensors", safetensors.numpy.save({"conv1.weight": np.zeros((9, 9), np.float32)}))
TWO = {f"{part}.layer1.0.conv1.weight": np.zeros((3, 3, 3, 3), np.float32) for part in ("left", "right")}
file("weights_two_networks x.safetensors", safetensors.numpy.save(TWO))
LATER = {"crate_jax": json.dumps({"version": 99, "family": "crate_jax", "config": {}})}
file("weights_later x.safetensors", safetensors.numpy.save({"encoder/x": np.zeros(3, np.float32)}, LATER))


@maker
def weights_resnet(folder: Path) -> None:
    """A thin ResNet18 under torchvision's names."""
    from tests.convert.test_convert import random_state, resnet

    safetensors.numpy.save_file(random_state("resnet", resnet((2, 2, 2, 2), 4)), folder / "x.safetensors")


@maker
def weights_crate_torch(folder: Path) -> None:
    """Weights under the names of modeling_crate.py, with a config.json that says nothing."""
    from tests.convert.test_convert import crate_torch, random_state

    safetensors.numpy.save_file(random_state("crate_torch", crate_torch(8, 1, 4, 16)), folder / "x.safetensors")
    (folder / "config.json").write_text('{"model_type": "crate"}')


@maker
def weights_small_stem(folder: Path) -> None:
    """A thin ResNet18 under torchvision's names, with a 3 x 3 stem."""
    from tests.convert.test_convert import random_state, resnet

    safetensors.numpy.save_file(random_state("resnet", resnet((2, 2, 2, 2), 4, side=3)), folder / "x.safetensors")


@maker
def images_other_classes(folder: Path) -> None:
    """Classes of the test split that the training split does not have."""
    images(folder)
    (folder / "images" / "test" / "dog").rename(folder / "images" / "test" / "horse")


@maker
def images_no_extension(folder: Path) -> None:
    """Files, none of which has an image's extension."""
    (folder / "images").mkdir()
    (folder / "images" / "photo.heic").write_bytes(b"x")


@maker
def images_strays(folder: Path) -> None:
    """A logo beside the classes, an archive's folder, and a class of photos in a format that is not read."""
    images(folder)
    train = folder / "images" / "train"
    for name in ("__MACOSX", "owl"):
        (train / name).mkdir()
    shutil.copy(train / "cat" / "0.png", train / "__MACOSX")
    shutil.copy(train / "cat" / "0.png", train / "logo.png")
    for i in range(2):
        (train / "owl" / f"{i}.heic").write_bytes(b"x")


@maker
def images_hidden_test(folder: Path) -> None:
    """ImageNet's layout: the test split has no labels."""
    images(folder, splits=("train", "Valid"))
    shutil.copytree(folder / "images" / "Valid" / "cat", folder / "images" / "test")


@maker
def images_rare_class(folder: Path) -> None:
    """No test image of a class."""
    images(folder)
    shutil.rmtree(folder / "images" / "test" / "dog")


@maker
def image_with_codes(folder: Path) -> None:
    """A name that would clear the terminal and print an error of its own."""
    images(folder)
    (folder / "images" / "train" / "cat" / "\x1b[2J\nerror: x.png").write_bytes(BAD_IMAGES["text"])


@maker
def arrays(folder: Path) -> None:
    """Images whose values are floats."""
    np.savez(folder / "a.npz", x=np.zeros((9, 12, 12, 3), np.float32))


@maker
def parquet_lost(folder: Path) -> None:
    """The first of two shards; it is not read."""
    (folder / "set").mkdir()
    (folder / "set" / "train-00000-of-00002.parquet").touch()


@maker
def shard_cut(folder: Path) -> None:
    """A tar file whose only image ends early."""
    info = tarfile.TarInfo("0.png")
    info.size = 5000
    (folder / "train-0.tar").write_bytes(info.tobuf() + bytes(2000))


@maker
def shard_latin(folder: Path, label: bytes = "Bär".encode("latin-1")) -> None:
    """A tar file whose only label is in Latin-1."""
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name, data in (("0.png", encoded("PNG")), ("0.cls", label)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


@maker
def shard_unlabelled(folder: Path) -> None:
    """A tar file whose only label is empty."""
    shard_latin(folder, b"")


@maker
def weights_npz(folder: Path) -> None:
    """NumPy's format."""
    np.savez(folder / "x.npz", a=np.zeros(3))


@maker
def weights_ours(folder: Path) -> None:
    """RUN's weights as a file."""
    from crate_jax.convert import pretrained, weights

    encoder = pretrained.load(str(folder / "run"), "")
    weights.save(folder / "x.safetensors", encoder.config, encoder.params)


@maker
def weights_nan(folder: Path) -> None:
    """RUN's weights, one of them NaN, as a file."""
    from crate_jax.convert import pretrained, weights

    encoder = pretrained.load(str(folder / "run"), "")
    encoder.params["encoder"]["norm"]["scale"] = np.full_like(encoder.params["encoder"]["norm"]["scale"], np.nan)
    weights.save(folder / "x.safetensors", encoder.config, encoder.params)


@maker
def run_newer(folder: Path) -> None:
    """A checkpoint whose meta has no entry that this version reads."""
    for meta in (folder / "run" / "checkpoints").glob("*/meta/metadata"):
        body = {"format": 99, "step": 1}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        meta.write_text(json.dumps({"sha256": digest, "body": body}))


@maker
def run_damaged(folder: Path) -> None:
    """No checkpoint of the run is whole."""
    for data in (folder / "run" / "checkpoints").glob("[0-9]*/params/**/*"):
        if data.is_file():
            data.write_bytes(data.read_bytes()[:-5])


@maker
def run_without_meta(folder: Path) -> None:
    """The checkpoints' metas are gone."""
    for meta in (folder / "run" / "checkpoints").glob("*/meta"):
        shutil.rmtree(meta)


def page() -> str:
    """The table as Markdown."""
    text = [
        "# Bad inputs, and what is said",
        "",
        "Slips and damage that `tests/test_bad_inputs.py` tries. Each ends with this one line on stderr and exit",
        "status 2, and nothing that was there is changed; where a row says tolerated, the line is a warning or a",
        "result, and the command does its work. `...` stands for what differs between machines. This page is made of",
        "`tests/bad_inputs.toml` by `python -m tests.bad_inputs > docs/bad_inputs.md`.",
        "",
        "`main` is `python -m crate_jax.main`, `convert` is `python -m crate_jax.convert`, DIR a folder with the bad",
        "input, RUN the workdir of a finished run,",
        *(f"{name} is `{flags}`{',' if name == 'QUICK' else '.'}" for name, flags in SHORT.items()),
        "",
    ]
    group = ""
    for row in rows():
        if row.group != group:
            text += [""] if group else []
            group = row.group
            text += [f"## {group}", "", "| what | command | line |", "|---|---|---|"]
        cells = (row.what, f"`{row.command}`", ("tolerated: " if row.tolerated else "") + f"`{row.line}`")
        text.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(page(), end="")
