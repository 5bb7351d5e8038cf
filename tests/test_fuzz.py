"""A short, always equal part of `python -m tests.fuzz`, and what longer ones have found."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from crate_jax.convert import files
from crate_jax.data import decoding
from crate_jax.errors import CheckpointError
from tests import fuzz

pytestmark = pytest.mark.one_python

COUNTS = {"config": 60, "image": 750, "weights": 100, "convert": 20, "meta": 500, "records": 40, "report": 1}


def failures(name: str, folder, seed: int, count: int, **options) -> list[str]:
    """What the examples show that they must not; each line has what makes it again."""
    subject = fuzz.target(name, folder) if not options else fuzz.ConfigTarget(**options)
    found = []
    for n in range(count):
        try:
            subject.case(random.Random(f"{seed} {name} {n}"))
        except (Exception, SystemExit) as e:
            found.append(f"{name}, seed {seed}, example {n}: {e}")
    return found


@pytest.mark.parametrize("name", [name for name in fuzz.NAMES if name != "report"])  # that one compiles each time
def test_no_input_ends_in_a_traceback(name, tmp_path):
    assert not failures(name, tmp_path, 0, COUNTS[name], **({"builds": 4} if name == "config" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.NAMES)
def test_no_input_of_many_ends_in_a_traceback(name, tmp_path):
    assert not failures(name, tmp_path, 1, 20 * COUNTS[name])


def test_the_targets_notice_what_they_are_for(monkeypatch):
    """A parser that lets an exception through, and one that says two lines, are found."""
    subject = fuzz.ConfigTarget(builds=0)
    for parse in (lambda argv: 1 / 0, lambda argv: sys.exit(2)):
        monkeypatch.setattr(fuzz, "parse_flags", parse)
        with pytest.raises(AssertionError):
            subject.case(random.Random(0))


@pytest.mark.parametrize("buffering", [-1, 1])
@pytest.mark.parametrize("command", ["inspect", "--help"])
def test_printing_to_a_full_disk_ends_in_a_line(command, buffering, tmp_path, capsys):
    """Buffered, and each line at once."""
    subject = fuzz.ConvertTarget(tmp_path)
    subject.path.write_bytes(subject.seeds[0])
    with open("/dev/full", "w", buffering) as full, contextlib.redirect_stdout(full):
        assert fuzz.convert.main([command, str(subject.path)]) == 2
    assert capsys.readouterr().err == "error: the output cannot be written (No space left on device)\n"


def test_weights_for_a_full_disk_or_a_pipe_end_in_a_line(tmp_path, monkeypatch):
    def fail(*args):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(CheckpointError, match=r"out: cannot be written \(.*No space left"):
            files.write(tmp_path / "out", {"a": np.zeros(9, np.float32)}, {})
    assert not list(tmp_path.iterdir())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe: cannot be written \(not a regular file\)"):
        files.write(tmp_path / "pipe", {"a": np.zeros(9, np.float32)}, {})
    assert (tmp_path / "pipe").is_fifo()


def test_an_image_of_another_format_is_not_opened():
    """By its content a file named .png may be EPS, for which Pillow would start Ghostscript."""
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, "EPS")
    with pytest.raises(decoding.DecodeError, match="not an image in a known format"):
        decoding.open_image(out.getvalue())


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(decoding.DecodeError, match="not a regular file"):
            decoding.read_file(str(path))
