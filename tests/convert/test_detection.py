"""The recipe of detection: folders of images with boxes, what is refused, and a few steps where torchvision is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_jax.convert import detection, weights
from crate_jax.convert.detection import InputError, read_data
from crate_jax.convert.export import export
from tests.conftest import ROOT
from tests.convert.test_convert import resnet, write_zip
from tests.convert.test_resnet import a_state

pytestmark = pytest.mark.one_python

SIZE = (80, 112)  # height, width
COLOURS = {"red": (220, 30, 30), "blue": (20, 40, 230)}
Boxes = list[tuple[str, tuple[int, int, int, int]]]


def scene(seed: int) -> tuple[np.ndarray, Boxes]:
    """One rectangle of each colour on grey noise, in its half of the image: (pixels, (class, box) of each)."""
    rng = np.random.default_rng(seed)
    image, boxes = rng.integers(100, 140, (*SIZE, 3), dtype=np.uint8), []
    for k, (name, colour) in enumerate(COLOURS.items()):
        w, h = rng.integers(24, 48, 2)
        x, y = 56 * k + rng.integers(0, 56 - w), rng.integers(0, SIZE[0] - h)
        image[y : y + h, x : x + w] = colour
        boxes.append((name, (int(x), int(y), int(x + w), int(y + h))))
    return image, boxes


def coco(folder: Path, split: str, seeds: range) -> Path:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    about: dict = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]}
    for seed in seeds:
        image, boxes = scene(seed)
        Image.fromarray(image).save(folder / split / f"{seed}.png")
        about["images"].append({"id": seed, "file_name": f"{seed}.png", "height": SIZE[0], "width": SIZE[1]})
        for name, (x0, y0, x1, y1) in boxes:
            entry = {"image_id": seed, "category_id": 3 if name == "red" else 7, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            about["annotations"].append({**entry, "iscrowd": 0})
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(about))
    return path


def voc(folder: Path, split: str, seeds: range) -> Path:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image, boxes = scene(seed)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{seed}.jpg", quality=95)
        objects = "".join(
            f"<object><name>{name}</name><difficult>{int(name == 'blue' and seed % 2)}</difficult><bndbox>"
            f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, (x0, y0, x1, y1) in boxes
        )
        (folder / "Annotations" / f"{seed}.xml").write_text(f"<annotation>{objects}</annotation>")
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    path.write_text("".join(f"{seed}\n" for seed in seeds))
    return path


FORMATS = {"COCO": (coco, "train2017", "val2017"), "VOC": (voc, "trainval", "test")}


def folder_of(path: Path, kind: str, train: int = 4, test: int = 3) -> Path:
    write, first, second = FORMATS[kind]
    write(path, first, range(train))
    write(path, second, range(100, 100 + test))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_boxes_and_classes_of_a_folder(tmp_path, kind):
    """COCO numbers its classes by id and VOC by name; VOC counts pixels from 1; difficult objects are crowds."""
    data = read_data(folder_of(tmp_path, kind))
    assert (data.format, len(data.train), len(data.test)) == (kind, 4, 3)
    assert data.classes == (("red", "blue") if kind == "COCO" else ("blue", "red"))
    for picture, seed in zip((*data.train, *data.test), (*range(4), *range(100, 103)), strict=True):
        assert picture.path.stem == str(seed)
        expected = scene(seed)[1]
        assert list(picture.boxes) == [box for _, box in expected]
        assert [data.classes[label - 1] for label in picture.labels] == [name for name, _ in expected]
        assert picture.crowd == ((False, kind == "VOC" and seed % 2 == 1))


def test_pictures_without_objects_are_tested_and_not_trained(tmp_path):
    path = coco(tmp_path, "train2017", range(3))
    about = json.loads(path.read_text())
    for entry in about["annotations"]:
        entry["iscrowd"] = int(entry["image_id"] == 1)
        if entry["image_id"] == 2:
            entry["bbox"][2] = 0
    path.write_text(json.dumps(about))
    data = read_data(tmp_path, test="train2017")
    assert [p.path.stem for p in data.train] == ["0"]
    assert [len(p.boxes) for p in data.test] == [2, 2, 0]


def test_classes_that_the_test_split_lacks_keep_their_numbers(tmp_path):
    """VOC lists no classes: those of the training split count."""
    folder_of(tmp_path, "VOC")
    for path in (tmp_path / "Annotations").glob("10?.xml"):
        path.write_text(path.read_text().replace("blue", "red"))
    data = read_data(tmp_path)
    assert data.classes == ("blue", "red")
    assert {label for picture in data.test for label in picture.labels} == {2}


def changed_json(change):
    def apply(folder: Path) -> None:
        path = folder / "annotations" / "instances_train2017.json"
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))

    return apply


def changed_xml(old: str, new: str):
    def apply(folder: Path) -> None:
        path = folder / "Annotations" / "0.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return apply


def corners(about: dict) -> None:
    for entry in about["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]


BAD = {  # kind -> (format, what is done to the folder, the line)
    "another format": ("COCO", lambda f: (f / "annotations").rename(f / "labels"), "must hold either annotations/inst"),
    "no annotations": ("COCO", lambda f: (f / "annotations" / "instances_val2017.json").unlink(), "cannot be read"),
    "no json": ("COCO", lambda f: (f / "annotations" / "instances_train2017.json").write_text("{"), "JSONDecodeError"),
    "deep json": (
        "COCO", lambda f: (f / "annotations" / "instances_train2017.json").write_text("[" * 9**6), ".RecursionError: "
    ),
    "no list": ("COCO", changed_json(lambda a: a.pop("images")), "not an instances file of COCO .KeyError: 'images'"),
    "no image": ("COCO", lambda f: (f / "train2017" / "2.png").unlink(), "train2017/2.png: no such image"),
    "corners": ("COCO", changed_json(corners), r"reaches beyond its 112 x 80 pixels; it must be x, y, width, height"),
    "three numbers": ("COCO", changed_json(lambda a: a["annotations"][0]["bbox"].pop()), "must be four numbers"),
    "category": (
        "COCO", changed_json(lambda a: a["annotations"][0].update(category_id=4)), "category_id 4, which is not listed"
    ),
    "image id": ("COCO", changed_json(lambda a: a["annotations"][0].update(image_id=9)), "image_id 9, which is not"),
    "other categories": (
        "COCO", changed_json(lambda a: a["categories"].append({"id": 9, "name": "x"})), "two splits list different"
    ),
    "nothing to train": ("COCO", changed_json(lambda a: a["annotations"].clear()), "training split has no image with"),
    "no split": ("VOC", lambda f: (f / "ImageSets" / "Main" / "test.txt").unlink(), "test.txt: cannot be read"),
    "no xml": ("VOC", lambda f: (f / "Annotations" / "1.xml").unlink(), "1.xml: cannot be read"),
    "cut xml": ("VOC", changed_xml("</annotation>", ""), "0.xml: not XML"),
    "no box": ("VOC", changed_xml("bndbox>", "box>"), "0.xml: not XML"),
    "no number": ("VOC", changed_xml("<xmin>", "<xmin>a"), "0.xml: the bndbox of 'red' is .*must be four numbers"),
    "turned box": ("VOC", changed_xml("<xmax>", "<xmax>-"), "0.xml: the bndbox of 'red' is .*xmin, ymin, xmax, ymax"),
    "new class": (
        "VOC", lambda f: (f / "Annotations" / "100.xml").write_text(
            (f / "Annotations" / "100.xml").read_text().replace("red", "green")),
        "class 'green' is not in the training split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, capsys, kind):
    name, change, line = BAD[kind]
    change(folder_of(tmp_path, name))
    with pytest.raises(InputError, match=line) as e:
        read_data(tmp_path)
    assert "\n" not in str(e.value)
    assert detection.main([f"--data={tmp_path}", "--backbone=none"]) == 2
    assert capsys.readouterr().err == f"error: {e.value}\n"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data=/no/such/folder"], "--data=/no/such/folder: no such folder"),
        (["--batch-size=5"], "--batch-size=5: the training split has 4 images with objects"),
        (["--train=train2018"], "instances_train2018.json: cannot be read"),
        (["--out=gs://bucket/x"], "'gs://bucket/x' must be a path on a local or mounted file system; --help says more"),
        (["--batch-size=2", f"--out={ROOT / 'README.md'}/x"], "README.md/x: cannot be written (Not a directory)"),
        (["--batch-size=0"], "'0' must be a positive whole number; --help says more"),
        (["--norm=group"], "argument --norm: invalid choice: 'group'"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, line):
    try:
        status = detection.main([f"--data={folder_of(tmp_path, 'COCO')}", "--backbone=none", *flags])
    except SystemExit as e:
        status = e.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and line in error and error.count("\n") == 1


# --- Where PyTorch is installed.

TINY = ["--batch-size=2", "--size=80", "--max-size=120", "--workers=0", "--log-every=1", "--device=cpu"]


def exported(path: Path, width: int = 64, **kwargs) -> Path:
    """A ResNet18 with random weights, as a folder that `convert export` wrote."""
    state = {
        n: np.abs(a) if n.endswith("running_var") else a * 0.05 if a.ndim > 1 else a
        for n, a in a_state(resnet((2, 2, 2, 2), width, **kwargs)).items()
    }
    loaded = weights.load(write_zip(path.with_suffix(".pth"), state))
    loaded.config["data"]["mean"] = (0.4, 0.5, 0.6)
    export(loaded.config, loaded.params, "torchvision", path)
    return path


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    detection._replace(path, lambda at: at.write_text("old"))

    def full(at: Path) -> None:
        at.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="--out=.*: cannot be written .No space left"), detection._writes(tmp_path):
        detection._replace(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    pytest.importorskip("torchvision")
    return exported(tmp_path_factory.mktemp("backbone") / "out")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_exported_backbone_is_in_the_detector(tmp_path, backbone, kind):
    """Every tensor of it; the stages that are not trained keep their bits; scores where pycocotools is."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder, out = folder_of(tmp_path / "data", kind), tmp_path / "out"
    flags = [f"--backbone={backbone}", f"--data={folder}", f"--out={out}", *TINY, "--steps=2", "--trainable-layers=1"]
    assert detection.main(flags) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["model"], result["steps"]) == ("resnet18", 2)
    assert np.isfinite(result["loss"])
    assert ("AP" in result) == bool(__import__("importlib").util.find_spec("pycocotools"))
    trained = torch.load(out / "detector.pth")
    for name, tensor in load_file(backbone / "model.safetensors").items():
        if name.endswith("num_batches_tracked"):
            continue
        same = torch.equal(trained[f"backbone.body.{name}"], tensor)
        assert same != (name.startswith("layer4") and tensor.ndim == 4), name


def test_a_flipped_picture_takes_its_boxes_along(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    data = read_data(folder_of(tmp_path, "COCO", train=1))
    torch.manual_seed(0)
    pictures, lefts = detection.Pictures(data.train, flip=True), set()
    for _ in range(8):
        image, target = pictures[0]
        for box, label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            inside = 255 * image[:, box[1] : box[3], box[0] : box[2]].mean((1, 2))
            np.testing.assert_allclose(inside, COLOURS[data.classes[label - 1]], atol=1)
            lefts.add((label, box[0]))
    assert len(lefts) == 4  # both classes, as they are and flipped


def alone(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs the file as such, in a process of its own."""
    file = str(ROOT / "crate_jax" / "convert" / "detection.py")
    return subprocess.run([sys.executable, file, *flags], cwd="/", capture_output=True, text=True, check=False)


def test_the_file_runs_alone(tmp_path, backbone):
    """It needs nothing of crate_jax; and a batch norm in training moves its statistics."""
    torch = pytest.importorskip("torch")
    folder = folder_of(tmp_path / "data", "COCO")
    flags = [f"--backbone={backbone}", f"--data={folder}", f"--out={tmp_path / 'out'}", *TINY, "--norm=batch"]
    run = alone(*flags, "--steps=1")
    assert run.returncode == 0, run.stderr
    assert int(torch.load(tmp_path / "out" / "detector.pth")["backbone.body.bn1.num_batches_tracked"]) == 1


def test_scores_of_perfect_and_of_wrong_detections(tmp_path):
    """AP is 100 if each box is found, lower if the classes are exchanged; crowds count neither way."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("pycocotools")
    data = read_data(folder_of(tmp_path, "VOC"))
    args = detection.parser().parse_args([f"--data={tmp_path}", "--backbone=none", *TINY])

    class Oracle(torch.nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            self.swap, self.place = swap, 0

        def forward(self, images):
            picture = data.test[self.place]
            self.place += 1
            labels = torch.tensor(picture.labels)
            return [{"boxes": torch.tensor(picture.boxes), "labels": 3 - labels if self.swap else labels,
                     "scores": torch.ones(len(labels))}]  # fmt: skip

    assert detection.evaluate(Oracle(swap=False), data, args) == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert detection.evaluate(Oracle(swap=True), data, args)["AP"] < 10


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path / "nothing", "cannot be read"),
        (lambda path: write_zip(path / "x.safetensors", {"a": np.ones(3, np.float32)}), "damaged, or not .safetensors"),
        (lambda path: exported(path / "thin", width=4), r"none of resnet18, .* this one is \(4, 3, 7, 7\)"),
    ],
)
def test_a_backbone_that_does_not_fit_is_one_line(tmp_path, make, line):
    pytest.importorskip("torchvision")
    with pytest.raises(InputError, match=line):
        detection.read_backbone(make(tmp_path))


def test_images_that_cannot_be_read_are_one_line(tmp_path, backbone):
    """Also from the processes that read them."""
    folder = folder_of(tmp_path, "COCO")
    for path in (folder / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    run = alone(f"--backbone={backbone}", f"--data={folder}", *TINY, "--steps=1", "--workers=1")
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and "png: not a readable image" in run.stderr
    assert run.stderr.count("\n") == 1
