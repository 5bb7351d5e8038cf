"""Several processes, one per host, that run one job together: start-up, agreeing, and leaving.

They are found by flags, environment variables, SLURM or TPU metadata (:func:`find`). Once the job holds its workdir,
they watch over each other (:mod:`crate_jax.parallel.watch`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from crate_jax.errors import ConfigError, UserError
from crate_jax.parallel.watch import BYE, LOST, SILENCE, Watch, die

T = TypeVar("T")

START_SECONDS = 300.0  # for all processes to be there
GRACE = 2.0  # seconds that a process which fails leaves to others that fail in the same way
MESSAGE_BYTES = 2048  # of an error that process 0 tells the others

_processes = 1
_process = 0
_address = ""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which process this is, of how many.

    Attributes:
      address: HOST:PORT at which process 0 is found; empty: JAX asks the TPU's metadata for all three.
      processes: how many.
      process: this one's number, from 0.
      device: the only local accelerator that this process uses; None: all.
    """

    address: str = ""
    processes: int = 0
    process: int = 0
    device: int | None = None


def find(environ: Mapping[str, str], address: str = "", processes: int = 0, process: int = -1) -> Cluster | None:
    """Finds out whether this is one of several processes; None: a single one.

    Args:
      environ: the environment. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or, in a Kubernetes
        indexed Job, JOB_COMPLETION_INDEX) stand for the three flags; else SLURM's variables in a step of several
        tasks; else a TPU host of several.
      address: the flag --coordinator_address, HOST:PORT of process 0.
      processes: the flag --num_processes; 0: not given.
      process: the flag --process_id; -1: not given.

    Raises:
      ConfigError: some of the three are missing or wrong.
    """
    address = address or environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = str(processes or environ.get("JAX_NUM_PROCESSES", ""))
    given = environ.get("JAX_PROCESS_ID", "") if process < 0 else str(process)
    index = given or environ.get("JOB_COMPLETION_INDEX", "")
    if address or count or given:
        return _explicit(address, count, index)
    if _number(environ, "SLURM_NTASKS") > 1 and {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environ):
        return _slurm(environ)
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    several = "," in hosts or not hosts or _number(environ, "MEGASCALE_NUM_SLICES") > 1
    if _has_tpu(environ) and several:
        return Cluster()
    return None


def _explicit(address: str, count: str, index: str) -> Cluster | None:
    values = {
        "--coordinator_address (JAX_COORDINATOR_ADDRESS)": address,
        "--num_processes (JAX_NUM_PROCESSES)": count,
        "--process_id (JAX_PROCESS_ID)": index,
    }
    if count == "1" and index in ("", "0"):
        return None
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ConfigError(f"of several processes each needs all three of {', '.join(values)}; missing: {missing[0]}")
    for name, value in list(values.items())[1:]:
        if not value.isdecimal():
            raise ConfigError(f"{name}={value!r}: must be a whole number")
    if not re.fullmatch(r"\S+:\d+", address):
        raise ConfigError(f"{next(iter(values))}={address!r}: must be HOST:PORT of process 0")
    if not int(index) < int(count):
        raise ConfigError(f"--process_id={index}: must be below --num_processes={count}, counted from 0")
    return Cluster(address, int(count), int(index))


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "0")
    return int(value) if value.isdecimal() else 0


def _slurm(environ: Mapping[str, str]) -> Cluster:
    """The first node of the step is process 0's; the port follows from the job's number."""
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", environ["SLURM_STEP_NODELIST"])
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']!r}: must name the nodes of the step")
    port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
    # With one task per node it has all accelerators; with more, each has its own unless SLURM hid the others already.
    shared = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0] != "1"
    hidden = len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    device = _number(environ, "SLURM_LOCALID") if shared and not hidden else None
    address = f"{first[1]}{first[2] or ''}:{port}"
    return Cluster(address, _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID"), device)


def _has_tpu(environ: Mapping[str, str]) -> bool:
    here = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return here and wanted and "TPU_SKIP_MDS_QUERY" not in environ and importlib.util.find_spec("libtpu") is not None


def start(cluster: Cluster, seconds: float = START_SECONDS) -> None:
    """Connects this process to the others; to be called before JAX is used.

    Raises:
      UserError: it cannot. If after `seconds` not all processes are there, the process ends itself with status LOST and
        one line, since JAX would abort it.
    """
    global _processes, _process, _address
    # Our own handler of SIGTERM has to see it (crate_jax.interrupt); all processes agree in the train step.
    jax.config.update("jax_enable_preemption_service", False)
    who = f"process {cluster.process} of {cluster.processes}" if cluster.address else "this TPU host"
    where = cluster.address or "the address in the TPU's metadata"

    def give_up() -> None:
        role = "starts the meeting point at" if cluster.address and cluster.process == 0 else "looks for process 0 at"
        die(
            f"{who} {role} {where}, and not all processes met there in {seconds:.0f} s; are all of them "
            "started, with the same address and number of processes, and is the port open?", LOST,
        )  # fmt: skip

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            cluster.address or None,
            cluster.processes or None,
            cluster.process if cluster.address else None,
            local_device_ids=cluster.device,
            cluster_detection_method="deactivate" if cluster.address else None,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=int(SILENCE + 20),
            shutdown_timeout_seconds=int(SILENCE),
        )
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"{who} cannot join the others at {where}: {' '.join(str(e).split())[:300]}") from None
    finally:
        timer.cancel()
    _processes = cluster.processes or jax.process_count()
    _process = cluster.process if cluster.address else jax.process_index()
    _address = cluster.address


def processes() -> int:
    """How many processes run this job; does not start JAX."""
    return _processes


def process() -> int:
    """This one's number; does not start JAX."""
    return _process


def first() -> bool:
    """Whether this process is the one that writes and prints; does not start JAX."""
    return _process == 0


def largest(value: int) -> int:
    """The largest of one number per process; all must call it."""
    if _processes == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if _processes > 1:
        multihost_utils.sync_global_devices(name)


def in_order(parts: np.ndarray) -> np.ndarray:
    """Rows (n, ...) of each process, n its own, as one array with those of process 0 first; the same in all."""
    if _processes == 1:
        return parts
    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(parts))))
    padded = np.zeros((counts.max(), *parts.shape[1:]), parts.dtype)
    padded[: len(parts)] = parts
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([rows[:n] for rows, n in zip(everyone, counts, strict=True)])


def by_first(act: Callable[[], T]) -> T | None:
    """What `act` returns in process 0, which alone runs it; None in the others.

    Raises:
      UserError: `act` raised one, or an OSError; in every process.
    """
    if _processes == 1:
        return act()
    result: T | None = None
    error: Exception | None = None
    text = b""
    if first():
        try:
            result = act()
        except (UserError, OSError) as e:
            error, text = e, str(e).encode()[:MESSAGE_BYTES]
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(MESSAGE_BYTES, b"\0"), np.uint8))
    if error is not None:
        raise error
    heard = bytes(np.asarray(told, np.uint8)).rstrip(b"\0").decode(errors="ignore")
    if heard:
        raise UserError(heard)
    return result


def leave(status: int) -> NoReturn:
    """Ends a process that failed, without JAX's own end, which waits for the others: they end with the same status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log's disk is full
            stream.flush()
    if _watch is not None:
        _watch.end()
    time.sleep(GRACE)
    if _watch is not None:
        _watch.tell_failure(status)
    os._exit(status)


def fall_behind() -> NoReturn:
    """Ends a process that failed in a way nobody foresaw, after the time the watch needs if another one was first."""
    time.sleep(SILENCE if _watch is not None else 0)
    leave(1)


_watch: Watch | None = None


def watch() -> None:
    """Starts the watch, once; all processes must call it."""
    global _watch
    if _processes > 1 and _watch is None:
        _watch = Watch(_process, _processes, _address)


def unwatch() -> None:
    """Ends the watch: from now on processes may go."""
    if _watch is not None:
        _watch.end()
        _watch.tell(BYE)
