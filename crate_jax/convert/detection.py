"""Fine-tunes torchvision's Faster R-CNN with FPN on an exported ResNet, and reports COCO's AP (docs/detection.md).

    python -m crate_jax.convert export CHECKPOINT --format=torchvision --out=DIR
    python -m crate_jax.convert.detection --backbone=DIR --data=FOLDER --out=RESULT

This file needs PyTorch, torchvision and safetensors and imports nothing from crate_jax, so that it also runs as
``python detection.py`` where JAX is not installed. AP needs pycocotools.

Boxes are (left, top, right, bottom) in pixels, without an axis of their own name: (objects, 4).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

MODELS = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
LR, LR_BATCH = 0.02, 16  # detectron2's rate and the batch that it is for
# Splits and steps of the usual recipes (MoCo, arXiv 1911.05722): COCO's 1x schedule, and 24,000 steps on VOC.
DEFAULTS: dict[str, dict[str, Any]] = {
    "COCO": {"train": "train2017", "test": "val2017", "steps": 90_000},
    "VOC": {"train": "trainval", "test": "test", "steps": 24_000},
}
WARM_UP = 100  # steps
DECAYS = (2 / 3, 8 / 9)  # shares of the steps after which the rate falls to a tenth
SMALLEST = 0.6  # of --size: the smallest shorter side in training


class InputError(Exception):
    """A file, folder or flag cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image and its objects.

    Attributes:
      path: the image file.
      boxes: (left, top, right, bottom) of each object, in pixels.
      labels: number of each object's class, from 1.
      crowd: whether an object counts neither as found nor as missed: COCO's crowds, VOC's difficult objects.
    """

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Data:
    """Both splits of a folder.

    Attributes:
      format: a key of DEFAULTS.
      classes: names of the classes 1, 2, ...
      train: pictures with at least one object that is no crowd.
      test: all pictures of the test split.
    """

    format: str
    classes: tuple[str, ...]
    train: tuple[Picture, ...]
    test: tuple[Picture, ...]


# --- Folders of images with boxes.


def read_data(folder: Path, train: str = "", test: str = "") -> Data:
    """Reads a folder in the format of COCO (``annotations/instances_SPLIT.json``) or of VOC (``Annotations/ID.xml``).

    Args:
      folder: the data set's folder; a VOC data set has one per year, such as ``VOCdevkit/VOC2007``.
      train: name of the training split; empty: the usual one.
      test: name of the test split; empty: the usual one.

    Raises:
      InputError: a file is missing or says something impossible.
    """
    if not folder.is_dir():
        raise InputError(f"--data={folder}: no such folder")
    kinds = {"COCO": (folder / "annotations").is_dir(), "VOC": (folder / "ImageSets" / "Main").is_dir()}
    if sum(kinds.values()) != 1:
        raise InputError(
            f"--data={folder}: must hold either annotations/instances_SPLIT.json (COCO) or Annotations/*.xml and "
            "ImageSets/Main/SPLIT.txt (VOC)"
        )
    kind = "COCO" if kinds["COCO"] else "VOC"
    read = _read_coco if kind == "COCO" else _read_voc
    found = [read(folder, split or DEFAULTS[kind][part]) for part, split in (("train", train), ("test", test))]
    (classes, training), (test_classes, testing) = found
    if kind == "VOC":  # the classes are those of the training split
        for name in test_classes:
            if name not in classes:
                raise InputError(
                    f"--test={test or DEFAULTS[kind]['test']}: class '{name}' is not in the training split"
                )
        number = {i: classes.index(name) + 1 for i, name in enumerate(test_classes, 1)}
        testing = [dataclasses.replace(p, labels=tuple(number[i] for i in p.labels)) for p in testing]
    elif classes != test_classes:
        raise InputError(f"--data={folder}: the two splits list different categories")
    training = [p for p in training if not all(p.crowd)]
    if not training or not testing:
        raise InputError(f"--data={folder}: the {'test' if training else 'training'} split has no image with an object")
    return Data(kind, tuple(classes), tuple(training), tuple(testing))


def _read_coco(folder: Path, split: str) -> tuple[list[str], list[Picture]]:
    path = folder / "annotations" / f"instances_{split}.json"
    try:
        about = json.loads(path.read_text())
        categories = {c["id"]: c["name"] for c in sorted(about["categories"], key=lambda c: c["id"])}
        images = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in about["images"]}
        objects = [(a["image_id"], a["category_id"], a["bbox"], a.get("iscrowd", 0)) for a in about["annotations"]]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: not an instances file of COCO ({type(e).__name__}: {e})") from None
    number = {category: i for i, category in enumerate(categories, 1)}
    found: dict[Any, list[tuple]] = {image: [] for image in images}
    for image, category, bbox, crowd in objects:
        if image not in images or category not in categories:
            what = f"image_id {image}" if image not in images else f"category_id {category}"
            raise InputError(f"{path}: an annotation has {what}, which is not listed")
        x, y, w, h = _four(bbox, f"{path}: the bbox of an object in {images[image][0]}")
        if w <= 0 or h <= 0:  # a few of COCO's own
            continue
        name, width, height = images[image]
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            raise InputError(
                f"{path}: the bbox {list(bbox)} in {name} reaches beyond its {width} x {height} pixels; it must be "
                "x, y, width, height"
            )
        found[image].append(((x, y, x + w, y + h), number[category], bool(crowd)))
    pictures = [_picture(folder / split / images[image][0], entries) for image, entries in found.items()]
    return list(categories.values()), pictures


def _read_voc(folder: Path, split: str) -> tuple[list[str], list[Picture]]:
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{listed}: cannot be read ({getattr(e, 'strerror', None) or 'not text'})") from None
    entries = [_voc_objects(folder / "Annotations" / f"{stem}.xml") for stem in stems]
    classes = sorted({name for objects in entries for _, name, _ in objects})
    number = {name: i for i, name in enumerate(classes, 1)}
    pictures = [
        _picture(folder / "JPEGImages" / f"{stem}.jpg", [(box, number[name], hard) for box, name, hard in objects])
        for stem, objects in zip(stems, entries, strict=True)
    ]
    return classes, pictures


def _voc_objects(path: Path) -> list[tuple]:
    """(box, name, difficult) of each object in a file of VOC, whose pixels are counted from 1."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for item in root.iter("object"):
            name, box = item.findtext("name"), item.find("bndbox")
            sides = [box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")] if box is not None else []
            x0, y0, x1, y1 = _four(sides, f"{path}: the bndbox of '{name}'")
            if not name or x1 < x0 or y1 < y0:
                raise InputError(f"{path}: the bndbox of '{name}' is {sides}; it must be xmin, ymin, xmax, ymax")
            objects.append(((x0 - 1, y0 - 1, x1, y1), name, item.findtext("difficult") == "1"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except ElementTree.ParseError as e:
        raise InputError(f"{path}: not XML ({e})") from None
    return objects


def _four(values: Any, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = map(float, values)
    except (TypeError, ValueError):
        raise InputError(f"{where} is {values}; it must be four numbers") from None
    return a, b, c, d


def _picture(path: Path, entries: Sequence[tuple]) -> Picture:
    if not path.is_file():
        raise InputError(f"{path}: no such image")
    boxes, labels, crowd = zip(*entries, strict=True) if entries else ((), (), ())
    return Picture(path, tuple(boxes), tuple(labels), tuple(crowd))


# --- The detector.


def read_backbone(path: Path) -> tuple[str, dict[str, Any], list[float], list[float]]:
    """Reads an exported ResNet.

    Args:
      path: a folder with model.safetensors, as `convert export` writes with --format=torchvision or timm; or that file.

    Returns:
      torchvision's name of the model, its tensors, and mean and standard deviation of its pixels.

    Raises:
      InputError: the file cannot be read, was not exported by crate_jax, or torchvision has no such ResNet.
    """
    import safetensors
    import torch
    import torchvision

    path = path / "model.safetensors" if path.is_dir() else path
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
            data = json.loads((file.metadata() or {})["crate_jax"])["config"]["data"]
            mean, std = [float(x) for x in data["mean"]], [float(x) for x in data["std"]]
    except OSError as e:
        raise InputError(f"--backbone={path}: cannot be read ({e.strerror or e})") from None
    except safetensors.SafetensorError as e:
        raise InputError(f"--backbone={path}: damaged, or not .safetensors ({e})") from None
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"--backbone={path}: not exported by crate_jax; `python -m crate_jax.convert export --format=torchvision`"
        ) from None
    shapes = {name: tuple(a.shape) for name, a in state.items()}
    for model in MODELS:
        with torch.device("meta"):
            wanted = getattr(torchvision.models, model)().state_dict()
        if shapes == {name: tuple(a.shape) for name, a in wanted.items() if not name.startswith("fc.")}:
            return model, state, mean, std
    stem = shapes.get("conv1.weight", "no conv1.weight")
    raise InputError(
        f"--backbone={path}: its shapes are those of none of {', '.join(MODELS)} of torchvision, whose stems are "
        f"(64, 3, 7, 7); this one is {stem}"
    )


def build(
    model: str, state: dict[str, Any], mean: list[float], std: list[float], classes: int, args: argparse.Namespace
) -> Any:
    """Faster R-CNN with FPN (arXiv 1506.01497, 1612.03144), whose backbone has the tensors `state`.

    Args:
      model: one of MODELS.
      state: tensors under torchvision's names; empty: the backbone is random.
      mean: mean per channel of pixels scaled to [0, 1].
      std: their standard deviation.
      classes: number of classes without the background.
      args: the flags.
    """
    from torch import nn
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if args.norm == "frozen" else nn.BatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name=model, weights=None, norm_layer=norm, trainable_layers=args.trainable_layers
    )
    if state:
        backbone.body.load_state_dict(state, strict=True)
    sides = sorted({*range(round(SMALLEST * args.size), args.size, 32), args.size})
    return FasterRCNN(backbone, classes + 1, min_size=sides, max_size=args.max_size, image_mean=mean, image_std=std)


class Pictures:
    """A data set for PyTorch's loader: (image (3, H, W) in 0..1, target), flipped at random if `flip`."""

    def __init__(self, pictures: Sequence[Picture], flip: bool) -> None:
        self.pictures, self.flip = pictures, flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Any, dict[str, Any]]:
        """Image and target `i`; crowds are no targets.

        Raises:
          InputError: the image cannot be read, or a box lies outside of it.
        """
        import torch
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        picture = self.pictures[i]
        try:
            with Image.open(picture.path) as file:
                image = to_tensor(file.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as e:
            raise InputError(f"{picture.path}: not a readable image ({e})") from None
        height, width = image.shape[-2:]
        kept = [k for k, crowd in enumerate(picture.crowd) if not crowd]
        boxes = torch.tensor([picture.boxes[k] for k in kept], dtype=torch.float32).reshape(-1, 4)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float32))
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise InputError(f"{picture.path}: a box lies outside of its {width} x {height} pixels")
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        labels = torch.tensor([picture.labels[k] for k in kept], dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": i}


def rate(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear warm-up, then steps of a tenth.

    >>> [round(rate(step, 9000), 3) for step in (0, 99, 5999, 6000, 8000)]
    [0.01, 1.0, 1.0, 0.1, 0.01]
    """
    return min(1.0, (step + 1) / WARM_UP) * 0.1 ** sum(step >= round(share * steps) for share in DECAYS)


def train(model: Any, data: Data, args: argparse.Namespace, log: Callable[[str], None] = print) -> float:
    """Trains with SGD; returns the mean loss of the last tenth of the steps.

    Raises:
      InputError: an image cannot be read, or the loss is not finite.
    """
    import torch

    loader = _loader(data.train, args, training=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    base = args.lr or LR * args.batch_size / LR_BATCH
    optimizer = torch.optim.SGD(trained, base, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    model.train()
    losses: list[float] = []
    for step, (images, targets) in zip(range(args.steps), _for_ever(loader), strict=False):
        parts = model([x.to(args.device) for x in images], [_to(t, args.device) for t in targets])
        loss = sum(parts.values())
        losses.append(loss.item())
        if losses[-1] != losses[-1] or losses[-1] == float("inf"):
            raise InputError(f"the loss is {losses[-1]} at step {step + 1}; try a smaller --lr than {base:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            recent = losses[-args.log_every :]
            log(f"step {step + 1}/{args.steps}: loss {sum(recent) / len(recent):.4f}")
    last = losses[-max(args.steps // 10, 1) :]
    return sum(last) / len(last)


def _loader(pictures: Sequence[Picture], args: argparse.Namespace, training: bool) -> Any:
    import torch

    return torch.utils.data.DataLoader(
        Pictures(pictures, flip=training),
        batch_size=args.batch_size if training else 1,
        shuffle=training,
        drop_last=training,
        num_workers=args.workers,
        collate_fn=_columns,
    )


def _columns(rows: list) -> tuple:
    return tuple(zip(*rows, strict=True))


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _to(target: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in target.items()}


def evaluate(model: Any, data: Data, args: argparse.Namespace) -> dict[str, float] | None:
    """COCO's AP, AP50 and AP75 on the test split, in percent; None without pycocotools.

    Raises:
      InputError: an image cannot be read.
    """
    import torch

    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        return None
    model.eval()
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for images, targets in _loader(data.test, args, training=False):
            for output, target in zip(model([x.to(args.device) for x in images]), targets, strict=True):
                for box, label, score in zip(*(output[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
                    found.append(
                        {"image_id": target["image_id"], "category_id": label, "bbox": _xywh(box), "score": score}
                    )
    if not found:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _as_coco(data)
        truth.createIndex()
        scores = COCOeval(truth, truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return {name: 100 * float(scores.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}


def _xywh(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _as_coco(data: Data) -> dict[str, Any]:
    """The test split as pycocotools reads it; a picture's number is its place."""
    objects = [
        {"image_id": i, "category_id": label, "bbox": (b := _xywh(box)), "area": b[2] * b[3], "iscrowd": int(crowd)}
        for i, picture in enumerate(data.test)
        for box, label, crowd in zip(picture.boxes, picture.labels, picture.crowd, strict=True)
    ]
    return {
        "info": {},
        "images": [{"id": i} for i in range(len(data.test))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(data.classes, 1)],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(objects, 1)],
    }


# --- The command.


class Parser(argparse.ArgumentParser):
    """Argparse's parser, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        print(f"error: {message}; --help says more", file=sys.stderr)
        sys.exit(2)


def parser() -> Parser:
    """The parser of the command line."""
    top = Parser(description="Fine-tunes torchvision's Faster R-CNN on a ResNet that crate_jax exported; reports AP.")
    add = top.add_argument
    add(
        "--backbone", required=True, type=_local, metavar="DIR|none", help="an exported ResNet; none: a random ResNet50"
    )
    add("--data", required=True, type=_folder, metavar="FOLDER", help="in the format of COCO or VOC")
    add("--train", default="", metavar="SPLIT", help="training split; default: train2017 (COCO), trainval (VOC)")
    add("--test", default="", metavar="SPLIT", help="test split; default: val2017 (COCO), test (VOC)")
    add("--out", type=_folder, metavar="RESULT", help="folder for result.json and detector.pth")
    add("--steps", type=_positive, default=0, help="default: 90000 (COCO), 24000 (VOC)")
    add("--batch-size", type=_positive, default=LR_BATCH, help="images per step")
    add("--lr", type=float, default=0.0, help=f"learning rate; default: {LR} x batch / {LR_BATCH}")
    add("--norm", choices=("frozen", "batch"), default="frozen", help="batch norms keep their statistics, or train")
    add("--trainable-layers", type=int, choices=range(6), default=5, help="stages that are trained, from the last one")
    add("--size", type=_positive, default=800, help="shorter side in pixels; training draws from 0.6 of it upwards")
    add("--max-size", type=_positive, default=1333, help="longest side in pixels")
    add("--device", default="", help="default: cuda if there is one, else cpu")
    add("--workers", type=int, default=4, help="processes that read images")
    add("--seed", type=int, default=0, help="of new layers, order and flips")
    add("--log-every", type=_positive, default=100, help="steps between lines")
    return top


def _local(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a path on a local or mounted file system")
    return text


def _folder(text: str) -> Path:
    return Path(_local(text))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates; returns what result.json gets.

    Raises:
      InputError: something cannot be used.
    """
    data = read_data(args.data, args.train, args.test)
    if args.batch_size > len(data.train):
        raise InputError(
            f"--batch-size={args.batch_size}: the training split has {len(data.train)} images with objects"
        )
    if args.out:  # before hours of training
        with _writes(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    try:
        import safetensors
        import torch
        import torchvision
    except ImportError as e:
        raise InputError(f"needs PyTorch: pip install torch torchvision safetensors ({e})") from None
    del safetensors, torchvision  # only asked for
    random.seed(args.seed)  # torchvision draws the training size from it
    torch.manual_seed(args.seed)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.steps = args.steps or DEFAULTS[data.format]["steps"]
    if args.backbone == "none":
        if args.norm == "frozen":
            raise InputError("--backbone=none: a random backbone has no statistics to freeze; give --norm=batch")
        name, state, mean, std = "resnet50", dict[str, Any](), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    else:
        name, state, mean, std = read_backbone(Path(args.backbone))
    print(
        f"{data.format}: {len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes; "
        f"{name} on {args.device}"
    )
    try:
        model = build(name, state, mean, std, len(data.classes), args).to(args.device)
    except RuntimeError as e:
        raise InputError(f"--device={args.device}: {str(e).splitlines()[0]}") from None
    loss = train(model, data, args)
    scores = evaluate(model, data, args)
    if scores is None:
        print("AP is not computed: pycocotools is not installed (pip install pycocotools)")
    result = {"model": name, "backbone": args.backbone, "steps": args.steps, "loss": loss, **(scores or {})}
    print(json.dumps(result))
    if args.out:
        text = json.dumps({**result, "classes": data.classes}) + "\n"
        with _writes(args.out):
            _replace(args.out / "result.json", lambda path: path.write_text(text))
            _replace(args.out / "detector.pth", lambda path: torch.save(model.state_dict(), path))
    return result


@contextlib.contextmanager
def _writes(folder: Path) -> Iterator[None]:
    """Makes an InputError of what the system, or torch, says of a file that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise InputError(
            f"--out={folder}: cannot be written ({getattr(e, 'strerror', None) or str(e).splitlines()[0]})"
        ) from None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file by what `write` writes, once it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status, which is 2 after an InputError."""
    try:
        run(parser().parse_args(argv))
    except InputError as e:
        last = str(e).strip().splitlines()[-1]  # one from a process that reads images has its traceback before it
        print(f"error: {last.rpartition('InputError: ')[2]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
