"""Files that are replaced whole: what a reader sees meanwhile, what an error leaves, what the disk has when."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from crate_jax.errors import UserError
from crate_jax.workdir import bucket, folder, metrics, pictures, whole


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with whole.whole(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("writer", [whole.whole, whole.durable])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, writer, error) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), writer(path) as file:
        (file.write_bytes if writer is whole.whole else file.write)(b"ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_the_disk_has_a_record_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    path, sync, on_disk = tmp_path / "a.json", os.fsync, []

    def recorded(number: int) -> None:
        sync(number)
        on_disk.append((os.fstat(number).st_ino, os.fstat(number).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    metrics.write_json(path, {"x": 2})
    assert on_disk == [(path.stat().st_ino, path.stat().st_size, False)]


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (f"a.npz.4711.{whole.ENDING}", "a.npz", "notes.tmp"):
        (tmp_path / name).touch()
    whole.remove_left(tmp_path)
    whole.remove_left(tmp_path / "nothing")
    assert names(tmp_path) == ["a.npz", "notes.tmp"]


class Unfinished(Figure):
    """A figure whose drawing ends in the middle, as on a full disk."""

    def savefig(self, path, *args, **kwargs) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_a_reader_sees_no_half_of_a_figure(tmp_path: Path) -> None:
    def drawn() -> Figure:
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 4])
        return figure

    metrics.write_figure(tmp_path / "a.b", drawn())
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert before["a.b.png"].startswith(b"\x89PNG") and before["a.b.svg"].rstrip().endswith(b"</svg>")
    metrics.write_figure(tmp_path / "a.b", drawn())
    with pytest.raises(UserError, match=r"a\.b\.png cannot be written: No space left on device; make room"):
        metrics.write_figure(tmp_path / "a.b", Unfinished())
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}


def test_a_reader_sees_no_half_of_a_picture(tmp_path: Path, monkeypatch) -> None:
    old = np.zeros((5, 7, 3), np.uint8)
    pictures.save_png(tmp_path / "a.png", old)
    before = (tmp_path / "a.png").read_bytes()

    def save(image, path, **_) -> None:
        Path(path).write_bytes(b"half")
        raise OSError

    monkeypatch.setattr(pictures.Image.Image, "save", save)
    with pytest.raises(OSError):
        pictures.save_png(tmp_path / "a.png", old + 1)
    assert (tmp_path / "a.png").read_bytes() == before and names(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x/cache", "HOME": "/me"}, "/x/cache"),
        ({"XDG_CACHE_HOME": "", "HOME": "/me"}, "/me/.cache"),
        ({"HOME": "/me"}, "/me/.cache"),
        ({"XDG_CACHE_HOME": "below", "HOME": "/me"}, "below"),
        ({"XDG_CACHE_HOME": "~nobody-of-this-name/x"}, None),
        ({"XDG_CACHE_HOME": "gs://bucket/x"}, None),
    ],
)
def test_the_folder_for_caches(variables, expected, monkeypatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME", bucket.SCRATCH):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        assert folder.cache() is None
        with pytest.raises(UserError, match=f"name a folder in the environment variable {bucket.SCRATCH}"):
            bucket.root()
    else:
        assert folder.cache() == Path(expected).absolute()
        assert bucket.root() == Path(expected).absolute() / "crate_jax" / "buckets"
