"""Writes numbers and pictures of a run: JSON lines, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress as RichProgress, TextColumn

from crate_jax.errors import ConfigError, UserError
from crate_jax.parallel import distributed
from crate_jax.workdir import readback
from crate_jax.workdir.pictures import save_png
from crate_jax.workdir.whole import durable, remove_left, whole

if TYPE_CHECKING:  # it takes 0.3 s, which most jobs need not spend
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

JSON_LINES = "metrics.jsonl"
PICTURE = re.compile(r"(?P<name>[\w.-]+)_(?P<step>\d{7,})\.png")  # the files that `Writer.write_image` makes
# TensorBoard and W&B know a record by its name alone, and TensorBoard drops a picture with the name of a scalar: the
# names of pictures begin with this there, and those of scalars do not.
PICTURES = "pictures/"
COMPILING = "compiling ..."  # the bar's text before the first step


def last_written(workdir: str | os.PathLike[str]) -> float | None:
    """When a run last wrote to its metrics.jsonl, in seconds since 1970; None: there is no such file."""
    try:
        return os.path.getmtime(os.path.join(workdir, JSON_LINES))
    except OSError:
        return None


class Sink(Protocol):
    """One destination of scalars and pictures."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records scalars of a step."""

    def write_image(self, step: int, name: str, array: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Writes what is still buffered, and closes the destination."""


class Writer:
    """Sends scalars and pictures of a run to every destination that its config asks for.

    These are always ``metrics.jsonl`` and ``pictures/*.png`` in the workdir, TensorBoard with
    ``config.log.tensorboard``, and Weights & Biases with ``config.log.wandb``. Only the first process writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], config: ConfigDict, start_step: int) -> None:
        """Opens all destinations.

        Args:
          workdir: the run's folder, which is created if it does not exist.
          config: the whole config of the run.
          start_step: the step from which the run continues; records and pictures of later steps are deleted, because
            they will be written again. 0: the run is new, and all are deleted.

        Raises:
          ConfigError: ``config.log.wandb`` is set but wandb is not installed or does not start.
          UserError: a file cannot be written.
        """
        if config.log.wandb and importlib.util.find_spec("wandb") is None:
            # Every process raises, so that no process waits for one that has ended.
            raise ConfigError(f"config.log.wandb={config.log.wandb!r}: wandb is not installed; pip install wandb")
        self._sinks: list[Sink] = []
        self._lines = os.path.join(workdir, JSON_LINES)
        if not distributed.first():
            return
        os.makedirs(workdir, exist_ok=True)
        with contextlib.ExitStack() as opened:
            for sink in _open_sinks(os.fspath(workdir), config, start_step):
                opened.callback(sink.close)
                self._sinks.append(sink)
            opened.pop_all()
        self._pictures = os.path.join(workdir, "pictures")
        with writing(self._pictures):
            remove_left(Path(self._pictures))
            for path in Path(self._pictures).glob("*.png"):
                match = PICTURE.fullmatch(path.name)
                if match and (int(match["step"]) > start_step or not start_step):
                    path.unlink()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records scalars of a step; a slash groups names ("eval/knn_top1").

        Raises:
          ValueError: a name is the name of the step, or begins as the names of pictures do.
          UserError: a file cannot be written.
        """
        taken = [name for name in scalars if name == "step" or name.startswith(PICTURES)]
        if taken:
            raise ValueError(f"write: a scalar must not have the name {taken[0]!r}")
        for sink in self._sinks:
            sink.write(step, scalars)

    def written(self, names: Sequence[str]) -> list[dict[str, float]]:
        """The scalars `names` of each record so far that holds them all, those of a run that continues included.

        They are the same in every process. All processes must call it.
        """
        rows = []
        if distributed.first():
            with open(self._lines, encoding="utf-8") as f:
                records = [json.loads(line) for line in f]
            rows = [[r[name] for name in names] for r in records if all(r.get(name) is not None for name in names)]
        if not distributed.max_over_processes(len(rows)):
            return []
        array = np.array(rows, np.float64).reshape(len(rows), len(names))
        everyone = distributed.gather_rows(array.view(np.uint8)).view(np.float64)  # JAX would round float64
        return [dict(zip(names, row, strict=True)) for row in everyone.tolist()]

    def holds(self, step: int, mark: str) -> bool:
        """Whether a step has a scalar `mark`, or one of the group `mark` ("mark/..."); "pictures/NAME" is a picture.

        The answer is that of process 0. All processes must call it.
        """
        found = False
        if distributed.first() and mark.startswith(PICTURES):
            found = os.path.exists(self._picture(step, mark.removeprefix(PICTURES)))
        elif distributed.first():
            with open(self._lines, encoding="utf-8") as f:
                names = [name for line in f if (record := json.loads(line))["step"] == step for name in record]
            found = any(name.partition("/")[0] == mark for name in names)
        return bool(distributed.max_over_processes(int(found)))

    def _picture(self, step: int, name: str) -> str:
        return os.path.join(self._pictures, f"{name}_{step:07d}.png")

    def write_image(self, step: int, name: str, array: np.ndarray) -> str | None:
        """Records a picture.

        Args:
          step: optimiser steps done.
          name: the picture's name, of letters, digits, "_", "-" and "."; TensorBoard and W&B show it as pictures/NAME.
          array: the picture, uint8 (H, W, 3).

        Returns:
          The path of the PNG file, ``pictures/NAME_STEP.png`` in the workdir; None in processes that do not write.

        Raises:
          TypeError: the array is not uint8 (H, W, 3).
          ValueError: the name has other characters.
          UserError: a file cannot be written.
        """
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"write_image: the name {name!r} must consist of letters, digits, '_', '-' and '.'")
        if not self._sinks:
            return None
        path = self._picture(step, name)
        with writing(path):
            save_png(path, array)
        for sink in self._sinks:
            sink.write_image(step, PICTURES + name, array)
        return path

    def close(self) -> None:
        """Closes all destinations, in the reverse order of opening."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_sinks(workdir: str, config: ConfigDict, start_step: int) -> Iterator[Sink]:
    yield JsonLines(os.path.join(workdir, JSON_LINES), start_step)
    if config.log.tensorboard:
        if importlib.util.find_spec("tensorboardX") is None:
            log.info("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")
        else:
            yield TensorBoard(os.path.join(workdir, "tensorboard"), start_step)
    if config.log.wandb:
        yield WeightsAndBiases(workdir, config, start_step)


class JsonLines:
    """A file with one JSON object per write, ``{"step": 100, "loss": 0.41}``, which is flushed at once.

    JSON has no NaN and no infinities; they are written as null, so that any JSON reader accepts the file.
    """

    def __init__(self, path: str, start_step: int) -> None:
        """Opens the file to append to it, and keeps only its whole lines up to `start_step` (none if it is 0)."""
        if os.path.exists(path):
            with writing(path), open(path, encoding="utf-8", errors="replace") as f:
                read = [(line, readback.scalars(line)) for line in f if start_step > 0]
            kept = [line for line, record in read if record is not None and record["step"] <= start_step]
            write_text(path, "".join(kept))
        with writing(path):
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        with writing(self._file.name):
            self._file.write(json.dumps(_plain({"step": int(step), **scalars}), allow_nan=False) + "\n")
            self._file.flush()

    def write_image(self, step: int, name: str, array: np.ndarray) -> None:
        """Does nothing: each picture is a separate file."""

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # the failed write of a line was already reported
            self._file.close()


class TensorBoard:
    """TensorBoard event files, by tensorboardX, but without its thread, which ends silently when the disk is full."""

    def __init__(self, folder: str, start_step: int) -> None:
        """Opens a new event file, which hides the events after `start_step` in older files."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._folder = Event, folder
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            self._writer = EventsWriter(os.path.join(folder, "events"))
        start = start_step + 1 if start_step else 0
        self._add(start, file_version="brain.Event:2")
        self._add(start, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        with writing(self._folder):
            self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
            self._writer.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one point per scalar."""
        from tensorboardX import summary

        points = [summary.scalar(name, float(value)).value[0] for name, value in scalars.items()]
        self._add(step, summary=summary.Summary(value=points))

    def write_image(self, step: int, name: str, array: np.ndarray) -> None:
        """Adds a picture."""
        from tensorboardX import summary

        self._add(step, summary=summary.image(name, array, dataformats="HWC"))

    def close(self) -> None:
        """Closes the event file."""
        with contextlib.suppress(OSError):  # the failed write of an event was already reported
            self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; the workdir keeps its id, so that a resumed run continues it."""

    def __init__(self, workdir: str, config: ConfigDict, start_step: int) -> None:
        """Starts a run, or continues it when `start_step` is above 0.

        Raises:
          ConfigError: wandb does not start, for example because there is no login.
        """
        import wandb

        id_file = os.path.join(workdir, "wandb_run_id.txt")
        run_id = None
        if start_step > 0 and os.path.exists(id_file):
            with open(id_file, encoding="utf-8") as f:
                run_id = f.read().strip() or None
        try:
            # A run that continues keeps the config that it began with, as config.json does.
            begun = config.to_dict() if run_id is None else None
            self._run = wandb.init(project=config.log.wandb, id=run_id, resume="allow", dir=workdir, config=begun)
        except wandb.Error as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise ConfigError(f"config.log.wandb={config.log.wandb!r}: {reason}") from e
        write_text(id_file, self._run.id + "\n")
        # The x axis is our own value: W&B's counter cannot go back, and a resumed run repeats the steps since its
        # checkpoint, with the same values.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars."""
        self._run.log({"step": int(step), **{name: float(value) for name, value in scalars.items()}})

    def write_image(self, step: int, name: str, array: np.ndarray) -> None:
        """Logs a picture."""
        import wandb

        self._run.log({"step": int(step), name: wandb.Image(array)})

    def close(self) -> None:
        """Uploads the remaining data and ends the run."""
        self._run.finish()


class Progress:
    """Shows how far a run is: a bar on a terminal, log lines elsewhere. Only the first process shows it.

    It is a context manager: while it is open on a terminal, log messages and prints appear above the bar; when the
    block ends, also by an error, the terminal is restored.
    """

    def __init__(self, total_steps: int, start_step: int, batch_size: int, steps_per_epoch: float) -> None:
        """Takes the run's last step, the step from which it starts, images per step, and steps per epoch."""
        self._total, self._start, self._batch_size = total_steps, start_step, batch_size
        self._per_epoch = steps_per_epoch
        self._bar: RichProgress | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if not distributed.first() or not sys.stderr.isatty() or console.is_dumb_terminal:
            return self
        with contextlib.ExitStack() as stack:
            original = {sys.stderr: "stderr"}
            if sys.stdout.isatty():
                original[sys.stdout] = "stdout"
            bar = RichProgress(
                TextColumn("epoch {task.fields[epoch]}  step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=console,
                refresh_per_second=4,
                redirect_stdout=sys.stdout in original,  # output to a file must stay in the file
                expand=True,
            )
            epoch = self._epoch(self._start)
            self._task = bar.add_task("", total=self._total, completed=self._start, epoch=epoch, text=COMPILING)
            self._bar = stack.enter_context(bar)
            stack.enter_context(_redirected_handlers(original))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar = None
        self._stack.close()

    def _epoch(self, step: int) -> str:
        """The epoch of the step after `step`, from 1, and their number: 6/20."""
        epochs = max(1, math.ceil(round(self._total / self._per_epoch, 6)))
        return f"{min(int(step / self._per_epoch) + 1, epochs)}/{epochs}"

    def reached(self, step: int) -> None:
        """Moves the bar to a step of which nothing else is known; the bar shows "compiling" until the first call."""
        if self._bar is not None:
            text = self._bar.tasks[0].fields["text"].removeprefix(COMPILING)
            self._bar.update(self._task, completed=step, epoch=self._epoch(step), text=text)

    def update(self, step: int, scalars: Mapping[str, float], images_per_sec: float) -> None:
        """Reports a step.

        Args:
          step: optimiser steps done.
          scalars: the scalars to show; the bar shows only "loss".
          images_per_sec: present speed in images per second, from which the remaining time is computed; 0: the speed is
            not known yet.
        """
        if not distributed.first():
            return
        left = "-"
        if images_per_sec > 0 and math.isfinite(images_per_sec):
            left = str(datetime.timedelta(seconds=round((self._total - step) * self._batch_size / images_per_sec)))
        speed = f"{images_per_sec:.0f} images/s  left {left}"
        if self._bar is not None:
            loss = f"loss {format_number(scalars['loss'])}  " if "loss" in scalars else ""
            self._bar.update(self._task, completed=step, epoch=self._epoch(step), text=loss + speed)
            return
        numbers = "".join(f"  {name} {format_number(value)}" for name, value in scalars.items())
        log.info("step %d/%d%s  %s", step, self._total, numbers, speed)


@contextlib.contextmanager
def _redirected_handlers(original: Mapping[TextIO, str]) -> Iterator[None]:
    """Makes log handlers write to the present `sys.stdout` and `sys.stderr` in place of the original streams.

    A handler keeps the stream that it was created with: if only `sys.stderr` were redirected, log lines would overwrite
    the bar.

    Args:
      original: for each original stream, its name in `sys`.
    """
    moved: list[tuple[logging.StreamHandler, TextIO]] = []
    for handler in list(logging.getLogger().handlers):
        handler = getattr(handler, "python_handler", handler)  # absl's handler wraps the one that writes
        stream = getattr(handler, "stream", None)
        if isinstance(handler, logging.StreamHandler) and stream is not None and stream in original:
            moved.append((handler, stream))
            handler.setStream(getattr(sys, original[stream]))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def format_number(x: float) -> str:
    """Formats a number with at most four significant digits and a short exponent.

    >>> format_number(0.41234), format_number(1.2e-7)
    ('0.4123', '1.2e-7')
    """
    mantissa, e, exponent = f"{float(x):.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes an object as indented JSON; a reader sees the old file or the whole new file, never a part.

    NumPy numbers and arrays become plain numbers and lists; NaN and infinities become null. Only one process may call
    it.

    Raises:
      UserError: the file cannot be written; the old file is unchanged.
    """
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def _plain(obj: Any) -> Any:
    """Returns `obj` with plain Python values in place of NumPy's and JAX's, and with None for NaN and infinities."""
    if isinstance(obj, Mapping):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, np.ndarray | np.generic | jax.Array):
        return _plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file by a rename, after the new contents have reached the disk. Only one process may call it.

    Raises:
      UserError: the file cannot be written, for example because the disk is full; the old file is unchanged.
    """
    with writing(path), durable(path) as f:
        # Names of folders and classes may hold bytes that are not text.
        f.write(text.encode("utf-8", "backslashreplace"))


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Writes a figure as ``PATH.png`` and ``PATH.svg``; the same figure gives the same files.

    Raises:
      UserError: a file cannot be written; the old file is unchanged.
    """
    import matplotlib

    for kind, metadata in {"png": None, "svg": {"Date": None}}.items():
        file = f"{os.fspath(path)}.{kind}"
        # The salt makes ids a function of the figure.
        with writing(file), whole(file) as temporary, matplotlib.rc_context({"svg.hashsalt": "crate_jax"}):
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)


def append_line(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Appends a line to a file of JSON objects, and waits until the disk has it. Only one process may call it.

    A last line that a crash cut short is removed; one that lacks only its end stays.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(path), open(path, "a+b") as f:
        f.seek(0)
        text = f.read()
        last = text[text.rfind(b"\n") + 1 :]
        whole = readback.parse(last.decode("utf-8", errors="replace")) is not None
        if not whole:
            f.truncate(len(text) - len(last))
        f.write((b"\n" if whole else b"") + json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError in its block into a UserError that names `path`.

    Args:
      path: the file or folder that the block writes.

    Raises:
      UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as e:
        reason = f"cannot be written: {e.strerror or e}; make room, or choose another folder"
        raise UserError(f"{os.fspath(path)} {reason}") from e
