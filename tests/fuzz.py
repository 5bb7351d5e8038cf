"""Random and mutated inputs: configs, images, files of weights, metas of checkpoints, what a report reads.

    python -m tests.fuzz SECONDS [config image weights convert meta records report] [--seed=N]

None may end in a traceback.

Each target is a class whose `case(rng)` makes one input, hands it to the library and raises what it should not have
raised; what an input is, is a function of the seed and the example's number, which a failure names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import quickstart, report as report_config
from crate_jax.config import base, validate
from crate_jax.convert import __main__ as convert, weights
from crate_jax.convert.export import FORMATS
from crate_jax.convert.torch_files import ALLOWED
from crate_jax.data import decoding
from crate_jax.data.sources import SyntheticSource
from crate_jax.errors import UserError
from crate_jax.flags import define_flags, fail, parse_flags
from crate_jax.jobs import JOBS, report, sweep, train
from crate_jax.jobs.train import method_of
from crate_jax.models import representation
from crate_jax.parallel import sharding
from crate_jax.report import Subject
from crate_jax.training.step import make_recipe
from crate_jax.validation import flatten
from crate_jax.workdir import checkpoint_files
from tests.convert import test_convert

NASTY = (
    '', ' ', '0', '-0', '-1', '1', '2', '3', '7', '0.5', '-0.0', '1e999', '-1e999', '1e-999', '1e30', 'nan', 'inf',
    '0x10', '1_000', '1,2', '1,2,3', '(1,2)', '[1,2]', '(1,(2,3))', '(,)', '()', '[]', '{}', "{'a': 1}", 'None',
    'True', 'false', "'x'", '"', "'", '\\', '\n', '\x00', '%s', '{0}', '\u043a\u043e\u0434\u0435\u0440', '\xe4\u0301',
    '\U0001f600', '\udcff', "a" * 5000, "9" * 30, "9" * 5000, "-" * 9, '=', ':', '/', '..', '~', 'lambda: 1',
    "__import__('os')", '1j', '1/0', "('(',)", "('a',)", '*', '?', 'crate', 'vit', 'mask', 'rop', 'srip', 'none',
    'adamw', 'linear', 'relative', 'learned', 'drop', 'upernet', 'folder:', 'folder:\x00', 'tfds:', 'tfds:\x00',
    'digits',
)  # fmt: skip
ODD_JSON = (None, -1, 10**15, [], [10**12], [-3], ["a"], [3.5], "x", {}, True, "float32", 1e400)
CONFIGS = {
    "quickstart": "method penalty debug",
    "photos": "size minutes encoder method corruption penalty debug",
    "cifar10": "encoder corruption penalty debug",
    "crate_mae": "variant penalty debug",
    "rop_vitb": "variant penalty debug",
    "vit_mae": "variant penalty debug",
    "evaluate": "protocol task scratch debug",
    "segment": "head freeze scratch debug",
    "align": "debug",
    "report": "",
    "sweep": "over base seeds debug encoder",
}


class Target(Protocol):
    """Something to fuzz."""

    def case(self, rng: random.Random) -> None:
        """Tries one input."""


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A copy with a few bytes changed, taken out, repeated, or cut short; sizes and counts often become extreme."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # Half of them in the header, where sizes and types stand.
        where = rng.randrange(min(len(out), 64) if rng.random() < 0.5 else len(out)) if out else 0
        match rng.randrange(7):
            case 0 if out:
                out[where] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                out[where : where + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\xff\xff")
                )
            case 3:
                del out[where : where + rng.choice((1, 4, 100))]
            case 4:
                out[where:where] = out[where : where + rng.choice((1, 8, 200))]
            case 5:
                out[where:where] = rng.randbytes(rng.choice((1, 8, 200)))
            case 6 if rng.random() < 0.3:
                del out[where:]
    return bytes(out)


def spoiled(rng: random.Random, record: dict[str, Any]) -> dict[str, Any]:
    """A copy of a record in which up to three keys, at any depth, are missing or have values of another kind."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        node, keys = record, []
        while isinstance(node, dict) and node and (not keys or rng.random() < 0.8):
            keys.append(rng.choice(sorted(node)))
            parent, node = node, node[keys[-1]]
        if keys and rng.random() < 0.2:
            del parent[keys[-1]]
        elif keys:
            parent[keys[-1]] = rng.choice(ODD_JSON)
    return record


class ConfigTarget:
    """A command line through the real parser and validation; of those that are valid and small some are built as well.

    Args:
      builds: how many, as that takes long.
    """

    def __init__(self, builds: int = 10**9) -> None:
        if "config" not in flags.FLAGS:
            define_flags()
        self.builds_left = builds
        self.keys = sorted(flatten(base()))
        self.groups = sorted({key.rpartition(".")[0] for key in self.keys} - {""})

    def text(self, rng: random.Random, key: str = "") -> str:
        """A value: nasty, what stands there now, a random number, or a mix."""
        match rng.randrange(5):
            case 0:
                return str(flatten(base()).get(key, rng.choice(NASTY)))
            case 1:
                return str(rng.choice((rng.randint(-4, 70), rng.uniform(-2, 2), 10 ** rng.randint(-12, 12))))
            case 2:
                return rng.choice(NASTY) + rng.choice((",", "", ".", "=")) + rng.choice(NASTY)
        return rng.choice(NASTY)

    def argv(self, rng: random.Random) -> list[str]:
        """A command line."""
        name = rng.choice(sorted(CONFIGS))
        words = CONFIGS[name].split()
        arg = "debug" if "debug" in words else ""
        if rng.random() < 0.4:
            items = []
            for _ in range(rng.randint(1, 3)):
                key = rng.choice((*words, *NASTY)) if words else rng.choice(NASTY)
                items.append(rng.choice((key, f"{key}={self.text(rng)}")))
            arg = ",".join(items)
        argv = ["main", f"--config=configs/{name}.py" + (f":{arg}" if arg else ""), "--workdir=w"]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            key = rng.choice(self.keys)
            if rng.random() < 0.1:
                key = rng.choice((*self.groups, key + ".x", key[:-1], rng.choice(NASTY), key.upper()))
            argv.append(f"--config.{key}={self.text(rng, key)}" if rng.random() < 0.95 else f"--config.{key}")
        if rng.random() < 0.05:
            rng.shuffle(argv)
        return argv

    def case(self, rng: random.Random) -> None:
        """Success, or status 2 and one line."""
        argv = self.argv(rng)
        before, sys.argv = sys.argv, argv
        err = io.StringIO()
        try:
            with flagsaver.flagsaver(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
                parse_flags(argv)
                self.check(flags.FLAGS.config)
        except SystemExit as e:
            lines = err.getvalue().splitlines()
            if e.code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or "Traceback" in lines[0]:
                raise AssertionError(f"{argv}: status {e.code}, {err.getvalue()[:2000]!r}") from e
        except UserError as e:
            if not str(e) or "Traceback" in str(e):
                raise AssertionError(f"{argv}: {e}") from e
        except Exception as e:
            raise AssertionError(f"{argv}: {type(e).__name__}: {e}") from e
        finally:
            sys.argv = before

    def check(self, config: Any) -> None:
        """What a job looks at before it opens any data; the shapes of the model, if it is a small one."""
        if config.job not in JOBS:
            fail(UserError("as main says it"))
        if config.job == "sweep":
            sweep.expand(config)
            return
        validate(config)
        sizes = [v for k, v in flatten(config).items() if isinstance(v, int)] + list(config.data.image_size)
        if self.builds_left <= 0 or config.job != "pretrain" or max(sizes) > 20_000 or config.encoder.width > 256:
            return
        self.builds_left -= 1
        method = method_of(config, SyntheticSource("train", config.data.image_size))
        make_recipe(config, method, 10 * config.batch_size)


class ImageTarget:
    """Damaged image files through the decoder."""

    def __init__(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 33, 3), np.uint8)
        image = Image.fromarray(pixels)
        turned = Image.Exif()
        turned[0x0112] = 6
        kinds = [
            (image, "PNG", {}), (image, "JPEG", {"exif": turned}), (image, "JPEG", {"progressive": True}),
            (image, "WEBP", {"lossless": True}), (image, "BMP", {}), (image, "TIFF", {}),
            (image, "PPM", {}), (image, "WEBP", {}), (image.convert("P"), "GIF", {}), (image.convert("P"), "PNG", {}),
            (image.convert("CMYK"), "JPEG", {}), (image.convert("RGBA"), "PNG", {}),
            (image.convert("RGBA"), "WEBP", {}),
            (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "PNG", {}), (image.convert("1"), "PNG", {}),
            (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "PNG", {"transparency": 400}),
            (Image.fromarray(pixels[..., 0].astype(np.int32) * 200), "TIFF", {"compression": "tiff_deflate"}),
            (image.convert("P"), "GIF", {"save_all": True, "append_images": [image.convert("P")]}),
        ]  # fmt: skip
        self.seeds = []
        for each, kind, options in kinds:
            out = io.BytesIO()
            each.save(out, kind, **options)
            self.seeds.append(out.getvalue())

    def case(self, rng: random.Random) -> None:
        """An image, or a DecodeError, in bounded time."""
        data = mutated(rng, rng.choice(self.seeds))
        if rng.random() < 0.05:  # the head of one and the tail of another
            data = data[: rng.randrange(len(data) + 1)] + rng.choice(self.seeds)[rng.randrange(100) :]
        start = time.monotonic()
        with contextlib.suppress(decoding.DecodeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decoding.open_image(data)
            height, width = decoding.oriented_size(image)
            box = (0, 0, height * rng.choice((0.5, 1)), width * rng.choice((0.5, 1)))
            small = decoding.crop_resize(image, box, (8, 8), Image.Resampling.BICUBIC)
            assert small.mode == "RGB" and small.size == (8, 8)
            pixels = decoding.decode(decoding.open_image(data))
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert time.monotonic() - start < 60, f"slow: {data[:100]!r}"


def program(rng: random.Random) -> bytes:
    """A pickle of random operations, most of which are possible where they stand; sizes are often extreme."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    def size(code: str) -> bytes:
        return struct.pack(code, rng.choice((0, 1, 300, 2**30, 2**31 - 1)))

    names = ["\n".join(name.rsplit(".", 1)).encode() for name in ALLOWED]
    pieces = [
        lambda: rng.choice((b"N", b"]", b"}", b")", b"\x88", b"\x8f", b"K\x03", b"(")),
        lambda: rng.choice((b"0", b"1", b"2", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"\x92", b"\x93", b"Q")),
        lambda: rng.choice((b"a", b"(NNe", b"s", b"(NNu", b"(NN\x90", b"(N\x91", b"(NNt", b"(NNo", b"(NNd", b"(Nl")),
        lambda: rng.choice((b"q", b"h")) + bytes([rng.randrange(4)]),
        lambda: text(rng.choice((b"a", b"storage", b"0", b"layer1.0.conv1.weight", b"args", b"\x1b[31m"))),
        lambda: b"c" + rng.choice(names) + b"\n",
        lambda: rng.choice((b"B", b"T", b"X", b"\x8b", b"j", b"r")) + size("<i"),
        lambda: rng.choice((b"\x8d", b"\x8e", b"\x96", b"\x95")) + size("<q"),
        lambda: b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x03tQ",
        lambda: b"q\x00h\x00h\x00\x86" * rng.choice((1, 70)),
    ]  # fmt: skip
    body = b"".join(rng.choice(pieces)() for _ in range(rng.choice((3, 10, 40))))
    return b"\x80\x02" + rng.choice((b"}", b"}(" + text(b"w"), b"")) + body + rng.choice((b"u.", b"s.", b"."))


class WeightsTarget:
    """Damaged files of weights, and hostile pickles in whole ones, through the reader of any model's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "weights"
        rng = np.random.default_rng(0)
        shapes = test_convert.vit(192, 1, 4, 4)
        state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        self.seeds = [safetensors.numpy.save(state), safetensors.numpy.save(state, {"crate_jax": '{"version": 1}'})]
        joint = test_convert.random_state("resnet", test_convert.resnet((2, 2, 2, 2), 4, side=3))
        joint = {f"backbone.{name}": a for name, a in joint.items()}
        self.seeds.append(safetensors.numpy.save(joint | {"classifier.weight": np.ones((3, 4), np.float32)}))
        for write in (test_convert.write_zip, test_convert.write_legacy):
            self.seeds.append(write(self.path, {"model": state}).read_bytes())
        loaded = weights.load(self.path)
        weights.save(self.path, loaded.config, loaded.params)
        self.seeds.append(self.path.read_bytes())
        with io.BytesIO() as file:
            np.savez(file, **state)
            self.seeds.append(file.getvalue())

    def case(self, rng: random.Random) -> None:
        """Weights, or a line; in bounded time and memory."""
        start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if rng.random() < 0.5:
            test_convert.write_zip(self.path, None, program(rng))
        else:
            self.path.write_bytes(self.damaged(rng))
        with contextlib.suppress(UserError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights.load(self.path)
        assert time.monotonic() - start < 60, "slow"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**19, "more than 512 MiB"

    def damaged(self, rng: random.Random) -> bytes:
        """A whole file with damage."""
        data = rng.choice(self.seeds)
        # Most of a file is numbers, any of which will do; names, types and sizes are at its ends.
        head = rng.choice((200, 4000, 20_000))
        if rng.random() < 0.7:
            return mutated(rng, data[:head]) + data[head:]
        return data[:-head] + mutated(rng, data[-head:])


class ConvertTarget(WeightsTarget):
    """``crate_jax.convert`` on whole and damaged files, writing to any place, printing to a full disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pipe = folder / "pipe"
        os.mkfifo(self.pipe)

    def case(self, rng: random.Random) -> None:
        """Success, or status 2 and one line."""
        data = rng.choice(self.seeds)
        self.path.write_bytes(data if rng.random() < 0.5 else mutated(rng, data[:4000]) + data[4000:])
        places = (self.path.with_name("out"), self.path, self.path / "below", self.path.parent, self.pipe)
        out = [f"--out={rng.choice(places)}"]
        command = rng.choice(("inspect", "import", "export"))
        argv = {
            "inspect": ["inspect", str(self.path)],
            "import": ["import", str(self.path), *out],
            "export": ["export", str(self.path), f"--format={rng.choice(sorted(FORMATS))}", *out],
        }[command]
        if rng.random() < 0.2:
            option = rng.choice(("--heads", "--image-size", "--mean", "--family", "--prefix", "--lam", "--format"))
            argv.append(f"{option}={rng.choice(NASTY)}")
        err = io.StringIO()
        full = rng.random() < 0.3
        with contextlib.redirect_stderr(err), open("/dev/full" if full else os.devnull, "w") as printed:
            try:
                with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    status = convert.main(argv)
            except SystemExit as e:
                status = e.code
            except Exception as e:
                raise AssertionError(f"{argv}: {type(e).__name__}: {e}") from e
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        if status not in (0, 2) or (status == 2) != (len(lines) == 1) or (full and status == 0 and command != "export"):
            raise AssertionError(f"{argv}: status {status}, {err.getvalue()[:2000]!r}")
        if not self.pipe.is_fifo():
            raise AssertionError(f"{argv}: a file is where the pipe was")


class MetaTarget:
    """A checkpoint's meta, damaged, or well-formed with values that no checkpoint has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        params = {"encoder/norm/scale": np.ones(3, np.float32)}
        arrays = {"params": {k: jax.numpy.asarray(v) for k, v in params.items()}, "rest": {}}
        self.meta = checkpoint_files.make_meta(1, {"config": base()}, arrays)
        (folder / checkpoint_files.META).mkdir()
        self.path = folder / checkpoint_files.META / "metadata"

    def case(self, rng: random.Random) -> None:
        """Arrays' targets, or a DamagedError."""
        if rng.random() < 0.3:
            self.path.write_bytes(mutated(rng, json.dumps(self.meta).encode()))
        else:
            body = spoiled(rng, self.meta["body"])
            self.path.write_text(json.dumps({"sha256": checkpoint_files._digest(body), "body": body}))
        with contextlib.suppress(checkpoint_files.DamagedError, MemoryError):  # main has a line for both
            meta = checkpoint_files.read_meta(self.folder)
            for item in checkpoint_files.ITEMS:
                targets = checkpoint_files.host_targets(meta, item)
                checkpoint_files.read_arrays(self.folder, meta, item, targets)
            checkpoint_files.changes(meta, base().to_dict())


class RecordsTarget:
    """The report at the end of a run whose records and pictures are damaged."""

    LINES = {
        "metrics.jsonl": [
            {"step": 1, "loss": 1.7, "whitebox/encoder/rate/01": 34.5, "whitebox/encoder/rate/02": 3.5},
            {"step": 2, "loss": 1.6, "whitebox/encoder/rate/01": 30.5, "whitebox/encoder/rate/02": None},
        ],
        "results.jsonl": [{"protocol": "knn", "data": "digits", "top1": 0.5, "top5": None}],
        "starts.jsonl": [
            {"step": 0, "time": "2026", "changed": [], "devices": "2 x cpu", "versions": {"jax": "0.10"}},
            {"step": 1, "changed": [{"key": "seed", "old": 0, "new": 1, "step": 1}], "devices": "2 x cpu"},
        ],
    }
    SUMMARY = {
        "steps": 2, "loss": 1.6, "images_per_sec": 9.5, "params": 2204, "devices": "2 x cpu", "probe_top1": 0.5,
        "probe_top1_untrained": 0.25, "probe_top1_pixels": 0.75, "knn_top1": None,
        "test_images": 60, "majority_top1": 0.1,
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        (self.folder / "pictures").mkdir(parents=True)
        self.picture = io.BytesIO()
        Image.new("RGB", (9, 5), (200, 10, 10)).save(self.picture, "PNG")
        self.config, self.mesh = base(), sharding.make_mesh(jax.device_count(), 1)
        self.config.steps = 2

    def case(self, rng: random.Random) -> None:
        """A page without what cannot be read, and one line for each section that is left out."""
        files = {name: "".join(json.dumps(x) + "\n" for x in lines) for name, lines in self.LINES.items()}
        files |= {"summary.json": json.dumps(self.SUMMARY)}
        files = {name: text.encode() for name, text in files.items()}
        files["pictures/grid_0000001.png"] = self.picture.getvalue()
        for name in rng.sample(sorted(files), rng.randint(1, 2)):
            match rng.randrange(4):
                case 0:
                    files[name] = mutated(rng, files[name])
                case 1:
                    files[name] = rng.choice((b"", b"\n", b"3\n", b"[]\n", b"null\n", b"[" * 10**5 + b"\n", b"\xff\n"))
                case _ if name in self.LINES:
                    lines = [spoiled(rng, x) if rng.random() < 0.7 else x for x in self.LINES[name]]
                    files[name] = "".join(json.dumps(x) + "\n" for x in lines).encode()
                case _ if name == "summary.json":
                    files[name] = json.dumps(spoiled(rng, self.SUMMARY)).encode()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        subject = Subject("run", self.config, {}, self.folder, None, None, self.mesh)
        sections, missing = report.analyse([subject], ["overview", "pictures", "details"])
        assert all(text and "Traceback" not in text and "\n" not in text for text in missing.values()), missing
        if rng.random() < 0.1:  # drawing takes long
            report.write(self.folder, {"run": "run"}, sections, missing)


class ReportTarget:
    """Reports on small encoders, also of a run with damaged checkpoints, about few or odd images."""

    SECTIONS = ("whitebox", "views", "collapse", "alignment")

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.paths = []
        for name in ("crate", "vit", "resnet18"):
            c = quickstart.get_config("debug")
            c.encoder.name, c.encoder.width, c.encoder.depth, c.encoder.heads = name, 16, 1, 2
            c.decoder.depth, c.decoder.heads, c.encoder.stage_width = 1, 2, 4
            if name == "crate":
                c.batch_size, c.steps, c.save.every, c.log.pictures, c.log.report = 16, 2, 1, 0, False
                train.run(c, str(self.run))
                continue
            params = jax.jit(functools.partial(representation.init_params, c))(jax.random.key(0))
            self.paths.append(folder / f"{name}.safetensors")
            weights.save(self.paths[-1], c.to_dict(), jax.device_get(params))

    def damaged(self, rng: random.Random) -> Path:
        """A copy of the run in which one file is missing or damaged."""
        copied = self.folder / f"run {rng.random()}"
        shutil.copytree(self.run, copied)
        file = rng.choice(sorted(path for path in copied.rglob("*") if path.is_file()))
        if rng.random() < 0.3:
            file.unlink()
        else:
            file.write_bytes(mutated(rng, file.read_bytes()))
        return copied

    def images(self, rng: random.Random) -> str:
        """A folder with few images, of one size or of several, some damaged, with classes or without."""
        folder = self.folder / str(rng.random())
        for split in rng.choice((("train",), ("train", "val"), ("",))):
            for name in rng.choice((("",), ("a",), ("a", "b"), ("a", "b", "c"))):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                for i in range(rng.choice((1, 1, 2, 3, 5))):
                    size = (rng.choice((1, 2, 8, 33)), rng.choice((1, 8, 9)))
                    pixels = np.random.default_rng(i).integers(0, rng.choice((1, 255)), (*size, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
                if rng.random() < 0.3:
                    (folder / split / name / "bad.png").write_bytes(b"no image")
        return f"folder:{folder}"

    def case(self, rng: random.Random) -> None:
        """A report, or one line; a section that cannot be made is named."""
        c = report_config.get_config()
        paths = [*self.paths, self.damaged(rng) if rng.random() < 0.5 else self.run]
        c.checkpoint = ",".join(map(str, rng.sample(paths, rng.choice((1, 1, 2)))))
        c.report.sections = (rng.choice(self.SECTIONS),)
        c.data.source = self.images(rng)
        c.data.max_undecodable = rng.choice((0.01, 0.5, 1.0))
        c.whitebox.images = rng.choice((1, 2, 3, 256))
        c.whitebox.measure = rng.choice(("paper", "released", "both"))
        c.evaluation.batch_size = rng.choice((1, 2, 64))
        with contextlib.suppress(UserError):
            found = report.run(c, str(self.folder / "report"))
            assert all(text and "\n" not in text for text in found["left_out"].values()), found


def target(name: str, folder: Path) -> Target:
    """A target by name; `folder` is its own."""
    if name in OF_A_FOLDER:
        return OF_A_FOLDER[name](folder)
    return {"config": ConfigTarget, "image": ImageTarget}[name]()


OF_A_FOLDER = {
    "weights": WeightsTarget, "convert": ConvertTarget, "meta": MetaTarget, "records": RecordsTarget,
    "report": ReportTarget,
}  # fmt: skip
NAMES = ("config", "image", *OF_A_FOLDER)


def campaign(seconds: float, names: list[str], seed: int) -> int:
    """Fuzzes each target for so long; prints how many examples, and failures once per place; returns their number."""
    found: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            subject, start, n = target(name, Path(folder)), time.monotonic(), 0
            while time.monotonic() - start < seconds:
                try:
                    subject.case(random.Random(f"{seed} {name} {n}"))
                except BaseException as e:
                    if isinstance(e, KeyboardInterrupt):
                        raise
                    cause = e.__cause__ or e
                    frame = traceback.extract_tb(cause.__traceback__)[-1]
                    place = f"{type(cause).__name__} {frame.filename.rpartition('/')[2]}:{frame.lineno}"
                    if place not in found:
                        found[place] = f"{name} {seed} {n}"
                        print(f"--- {name} example {n} of seed {seed}: {place}\n{str(e)[:600]}", flush=True)
                n += 1
            print(f"{name}: {n} examples", flush=True)
    return len(found)


if __name__ == "__main__":
    chosen = [arg for arg in sys.argv[2:] if arg in NAMES] or list(NAMES)
    number = next((int(arg.partition("=")[2]) for arg in sys.argv if arg.startswith("--seed=")), 0)
    length = float(sys.argv[1])
    sys.argv = sys.argv[:1]
    sys.exit(1 if campaign(length, chosen, number) else 0)
