"""docs/adding_a_part.md, followed literally: a source in one file and one row is opened, and its faults are named."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from crate_jax import config as config_lib, data
from crate_jax.errors import ConfigError, DataError
from tests.conftest import ROOT


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`crate_jax.data` with what the page says to add."""
    page = (ROOT / "docs" / "adding_a_part.md").read_text()
    section = page.partition("\n## A source of images\n")[2].partition("\n## ")[0]
    code, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    file = re.search(r"one file, `crate_jax/data/(\w+)\.py`", section)
    line = re.search(r"`(from crate_jax\.data\.\w+ import \w+)`", section)
    assert file is not None and line is not None
    module = ModuleType(f"crate_jax.data.{file[1]}")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert data.__file__ is not None
    text = Path(data.__file__).read_text()
    first, table = "\nfrom crate_jax.data", "SOURCES: dict[str, Row] = {\n"
    assert text.count(table) == 1
    text = text.replace(first, f"\n{line[1]}{first}", 1).replace(table, table + row)
    names = {"__name__": data.__name__}
    exec(compile(text, data.__file__, "exec"), names)
    return SimpleNamespace(**names)


def written(folder: Path) -> np.ndarray:
    """CIFAR-10's files with few images, whose red, green and blue differ; returns the training images."""
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    for name, part in {"data_batch_1": [0, 1], "data_batch_2": [2, 3, 4], "test_batch": [5, 6]}.items():
        records = [bytes([i]) + images[i].transpose(2, 0, 1).tobytes() for i in part]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return images[:5]


def configured(folder: Path, **options):
    c = config_lib.base()
    c.data.update({"source": f"cifar:{folder}", "image_size": (16, 16)} | options)
    return c


def test_the_page_has_a_source(edited, tmp_path):
    images = written(tmp_path)
    train, test = (edited.open_split(configured(tmp_path), split, labels_required=True) for split in ("train", "eval"))
    np.testing.assert_array_equal([train.read(i) for i in range(5)], images)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 3, 4], [5, 6])
    assert (train.split, test.split, test.class_names[5], test.name(1)) == ("train", "test", "dog", "cifar/test[1]")
    assert train.fingerprint() != test.fingerprint()
    assert edited.open_split(configured(tmp_path, eval_split=""), "eval") is None
    grey = edited.open_split(configured(tmp_path, channels=1, mean=(0.5,), std=(0.5,)), "train")
    assert grey.read(0).shape == (32, 32, 1)


def test_its_faults_are_named_in_one_line(edited, tmp_path):
    with pytest.raises(DataError, match=r"holds neither data_batch_\*.bin nor test_batch.bin"):
        edited.open_split(configured(tmp_path), "train")
    written(tmp_path)
    with pytest.raises(DataError, match="has no split 'val'; it has train, test; set config.data.eval_split"):
        edited.open_split(configured(tmp_path, eval_split="val"), "eval")
    with open(tmp_path / "data_batch_2.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="data_batch_2.bin: 9220 bytes; records of CIFAR-10 have 3073 bytes"):
        edited.open_split(configured(tmp_path), "train")


def test_the_row_is_all_that_names_it(edited):
    """The rules and the messages read the table."""
    rule = edited.DATA.keys["source"].rule
    assert not rule.problem("cifar:x") and rule.problem("cifar") and "cifar:PATH" in rule.text
    with pytest.raises(ConfigError, match="cifar:PATH"):
        edited.open_split(configured(Path("x"), source="nothing"), "train")
    with pytest.raises(ConfigError, match=r"channels=4: must be one of 1, 3 with config.data.source='cifar:x'"):
        edited.DATA.check(configured(Path("x"), channels=4, mean=(0.5,) * 4, std=(0.5,) * 4))
