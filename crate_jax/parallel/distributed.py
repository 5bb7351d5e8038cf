"""Several processes, one per host, that run one job together: how they start, agree and end.

Flags, environment variables, MPI's or SLURM's launcher, or JAX's own detection say which processes there are
(:func:`find`). They meet (:mod:`crate_jax.parallel.meeting`) before JAX connects them: its service believes whoever
comes, and a second process of the same number makes it end all of them. From then on they watch each other
(:mod:`crate_jax.parallel.watch`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from crate_jax.errors import ConfigError, UserError, some
from crate_jax.parallel import meeting
from crate_jax.parallel.watch import BYE, LOST, SILENCE, Watch, die

log = logging.getLogger(__name__)

T = TypeVar("T")

START_SECONDS = 300.0  # within which all processes must have started
GRACE_SECONDS = 2.0  # a process that fails waits so long, since others may fail in the same way
MAX_MESSAGE_BYTES = 2048  # size of an error message that process 0 sends to the others

_processes = 1
_process = 0
_watch: Watch | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which process this is, of how many.

    Attributes:
      address: HOST:PORT of process 0; empty: JAX detects address, processes and process.
      processes: the number of processes.
      process: this process's number, from 0.
      device: the number of the one local accelerator that this process uses; None: it uses all.
      token: a text that only the processes of this job know.
      method: JAX's name of the way in which it detects them; empty: it chooses, and only a TPU is detected so.
    """

    address: str = ""
    processes: int = 0
    process: int = 0
    device: int | None = None
    token: str = dataclasses.field(default="", repr=False)
    method: str = ""


# Variables that a launcher gives to each process: the number of processes, this one's, the number of those on this
# host, and this one's among them. mpirun comes before SLURM, since in a SLURM job its processes also see SLURM's
# variables, which then are those of the batch script or of mpirun's own helper.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("PMI_SIZE", "PMI_RANK", "PMI_LOCAL_SIZE", "PMI_LOCAL_RANK"),  # Cray
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
)
# A batch system's variables: the job's number, its hosts, the first of which runs process 0, and the file of its hosts.
BATCH_SYSTEMS = (
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", ""),
    ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", ""),
    ("PBS_JOBID", "", "PBS_NODEFILE"),
    ("LSB_JOBID", "LSB_HOSTS", "LSB_DJOB_HOSTFILE"),
)


def find(
    environ: Mapping[str, str], address: str = "", processes: int = 0, process: int = -1, method: str = ""
) -> Cluster | None:
    """Finds out whether this process is one of several.

    Args:
      environ: the environment. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or, in a Kubernetes
        indexed Job, JOB_COMPLETION_INDEX) stand for flags that are not given. Without flags and without these, the
        variables of mpirun or srun (LAUNCHERS) count if there are several processes; without those, the TPU's metadata
        if there are several hosts. CRATE_JAX_TOKEN is the token.
      address: the flag --coordinator_address, HOST:PORT of process 0. A launcher may give the other two values.
      processes: the flag --num_processes; 0: not given.
      process: the flag --process_id; -1: not given.
      method: the flag --cluster_detection_method, a value of the argument of `jax.distributed.initialize`; empty: not
        given.

    Returns:
      the cluster; None if this is the only process.

    Raises:
      ConfigError: one or two of the three flags are missing, or a value is wrong.

    >>> find({}, "localhost:8476", processes=4, process=1)
    Cluster(address='localhost:8476', processes=4, process=1, device=None, method='')
    """
    if method:
        if address or processes or process >= 0:
            raise ConfigError(
                f"--cluster_detection_method={method}: JAX then finds address, number of processes and this one's "
                "number; leave --coordinator_address, --num_processes and --process_id out"
            )
        return Cluster(method=method)
    where = _given("--coordinator_address", address, environ, "JAX_COORDINATOR_ADDRESS")
    count = _given("--num_processes", str(processes or ""), environ, "JAX_NUM_PROCESSES")
    given = _given("--process_id", "" if process < 0 else str(process), environ, "JAX_PROCESS_ID")
    token = environ.get("CRATE_JAX_TOKEN", "")
    names = _launcher(environ)
    if names is not None and not (count[1] or given[1]):
        launched = _launched(environ, names)
        where = where if where[1] else ("the address of the job's first host", _address(environ, launched))
        checked = _explicit(where, (names[0], launched[0]), (names[1], launched[1]), token)
        return checked and dataclasses.replace(checked, device=_device(environ, launched))
    if where[1] or count[1] or given[1]:
        index = given if given[1] else ("JOB_COMPLETION_INDEX", environ.get("JOB_COMPLETION_INDEX", ""))
        return _explicit(where, count, index, token)
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    several = "," in hosts or not hosts or _number(environ, "MEGASCALE_NUM_SLICES") > 1
    if _has_tpu(environ) and several:
        return Cluster()
    return None


NEEDED = (
    "--coordinator_address (JAX_COORDINATOR_ADDRESS)",
    "--num_processes (JAX_NUM_PROCESSES)",
    "--process_id (JAX_PROCESS_ID)",
)
MAX_DIGITS = 9  # of a number in the environment: Python refuses to read thousands


def _given(flag: str, value: str, environ: Mapping[str, str], variable: str) -> tuple[str, str]:
    """The flag and its value, or, if it is not given, the variable and its value."""
    return (flag, value) if value else (variable, environ.get(variable, ""))


def _explicit(address: tuple[str, str], count: tuple[str, str], index: tuple[str, str], token: str) -> Cluster | None:
    """The cluster of three values, each after the name of where it was read."""
    (where, host_port), (many, size), (this, number) = address, count, index
    if size == "1" and number in ("", "0"):
        return None
    for name, value in (count, index):
        if value and not _is_number(value):
            digits = f" of at most {MAX_DIGITS} digits" if value.isdecimal() else ""
            raise ConfigError(f"{name}={some([repr(value)], '')}: must be a whole number{digits}")
    missing = [name for name, (_, value) in zip(NEEDED, (address, count, index), strict=True) if not value]
    if missing:
        raise ConfigError(f"each of several processes needs all of {', '.join(NEEDED)}; missing: {missing[0]}")
    if not re.fullmatch(r"\S+:\d{1,5}", host_port) or not 0 < meeting.split(host_port)[1] < 2**16:
        raise ConfigError(f"{where}={host_port!r}: must be HOST:PORT of process 0, with a PORT up to 65535")
    if int(size) >= 2**16:
        raise ConfigError(f"{many}={size}: must be at most 65535")
    if not int(number) < int(size):
        raise ConfigError(f"{this}={number}: must be below {many}={size}, counted from 0")
    return Cluster(host_port, int(size), int(number), token=token)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def _number(environ: Mapping[str, str], name: str) -> int:
    """The number in a variable: 0 if there is none, and no more than MAX_DIGITS digits can say."""
    value = environ.get(name, "0")
    return int(value[: MAX_DIGITS + 1]) if value.isdecimal() else 0


def _launcher(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """The variables of the launcher of several processes, a row of LAUNCHERS."""
    for names in LAUNCHERS:
        # SLURM's batch script is no task, and sees no step.
        needed = {*names[:2], "SLURM_STEP_NODELIST"} if names[0] == "SLURM_NTASKS" else set(names)
        if needed <= environ.keys() and _number(environ, names[0]) > 1:
            return names
    return None


def _launched(environ: Mapping[str, str], names: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    """What the launcher says: the number of processes, this one's, and the same two on this host."""
    size, rank, local_size, local_rank = (environ.get(name, "") for name in names)
    return size, rank, re.split(r"[,(]", local_size)[0], local_rank  # SLURM's "2(x3),1" is that of all hosts


def _address(environ: Mapping[str, str], launched: tuple[str, str, str, str]) -> str:
    """Where process 0 is: on the batch job's first host, or here if all are here; the port follows from the job."""
    for job, names, file in BATCH_SYSTEMS:
        if job not in environ:
            continue
        port = 61440 + int(re.sub(r"\D.*", "", environ[job])[-MAX_DIGITS:] or 0) % 4096
        hosts = environ.get(names, "").strip()
        with contextlib.suppress(OSError):
            hosts = hosts or Path(environ.get(file, "")).read_text().strip()
        first = re.match(r"([^,\[\s]+)(?:\[(\w+))?", hosts)  # also SLURM's gpu[007-010]
        if first is not None:
            return f"{first[1]}{first[2] or ''}:{port}"
    return "127.0.0.1:61440" if launched[0] == launched[2] else ""


def _device(environ: Mapping[str, str], launched: tuple[str, str, str, str]) -> int | None:
    """The only process of a host uses all accelerators; of several each uses one, unless the others are hidden."""
    shared = launched[2] not in ("", "1") and _is_number(launched[3])
    hidden = len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return int(launched[3]) if shared and not hidden else None


def _has_tpu(environ: Mapping[str, str]) -> bool:
    here = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return here and wanted and "TPU_SKIP_MDS_QUERY" not in environ and importlib.util.find_spec("libtpu") is not None


def start(cluster: Cluster, seconds: float = START_SECONDS) -> None:
    """Connects this process to the others, which then watch each other. Must be called before JAX is used.

    If after `seconds` some processes are still missing, this process ends with one line and status LOST. JAX would
    abort it without such a line.

    Raises:
      UserError: this process cannot join the others, or it is already there.
    """
    global _processes, _process, _watch
    # SIGTERM must reach our own handler (crate_jax.parallel.interrupt); the train step tells it to all processes.
    jax.config.update("jax_enable_preemption_service", False)
    who = f"process {cluster.process} of {cluster.processes}" if cluster.address else "this process"
    where = cluster.address or f"the address that JAX detects ({cluster.method or 'TPU'})"

    def give_up() -> None:
        role = "starts the meeting point at" if cluster.address and cluster.process == 0 else "looks for process 0 at"
        missing = ", ".join(map(str, _watch.missing() if _watch is not None and cluster.process == 0 else []))
        die(
            f"{who} {role} {where}, but not all processes met there within {seconds:.0f} s"
            f"{missing and f' (missing: {missing})'}; start all of them, with the same address and number of "
            "processes, and open the port", LOST,
        )  # fmt: skip

    if cluster.method:
        logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # its line would come beside ours
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        address, bind = _meet(cluster) if cluster.address else (None, None)
        jax.distributed.initialize(
            address,
            cluster.processes or None,
            cluster.process if cluster.address else None,
            local_device_ids=cluster.device,
            cluster_detection_method="deactivate" if cluster.address else cluster.method or None,
            initialization_timeout=int(seconds) + 60,
            coordinator_bind_address=bind,
            # JAX's own end is an abort with a stack (status 134): with a watch it comes last, also to a process that
            # was stopped for minutes and is continued.
            heartbeat_timeout_seconds=600 if cluster.address else int(SILENCE + 20),
            shutdown_timeout_seconds=int(SILENCE),
        )
    except (RuntimeError, ValueError, OSError, meeting.RefusedError) as e:
        if cluster.method and isinstance(e, ValueError):
            raise ConfigError(
                f"--cluster_detection_method={cluster.method}: JAX does not know it, or finds no cluster in this way"
            ) from None
        raise UserError(f"{who} cannot join the others at {where}: {' '.join(str(e).split())[:300]}") from None
    finally:
        timer.cancel()
    if not cluster.address:
        _processes, _process = jax.process_count(), jax.process_index()
        _watch = _watch_without_address() if _processes > 1 else None


def _meet(cluster: Cluster) -> tuple[str, str]:
    """Meets the others at the cluster's address, and starts the watch.

    JAX's service gets another port: there nobody comes by accident, such as the same command started twice.

    Returns:
      HOST:PORT at which to reach JAX's service, and HOST:PORT at which process 0 lets it listen.

    Raises:
      meeting.RefusedError: this process is already there.
      OSError: in process 0, the port is in use by another program, or not allowed.
    """
    global _processes, _process, _watch
    host, port = meeting.split(cluster.address)
    bind, token = meeting.bind_host(host), cluster.token.encode()
    if cluster.process == 0:
        try:
            listener = meeting.listen(bind, port)
        except OSError:
            with contextlib.suppress(OSError):  # a run there says that it is one
                meeting.knock(cluster.address, 0, cluster.processes, token, attempts=1)
            raise
        with meeting.listen(bind, 0) as held:  # else another program may get the port while this one waits
            service = held.getsockname()[1]
            _watch = Watch(0, cluster.processes, token, listener, service)
            _watch.met.wait()
    else:
        peer, answer = meeting.knock(cluster.address, cluster.process, cluster.processes, token)
        service = answer.port
        _watch = Watch(cluster.process, cluster.processes, token, first=(peer, answer.name))
    _processes, _process = cluster.processes, cluster.process
    return f"{_join(host)}:{service}", f"{_join(bind or '::')}:{service}"


def _join(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _watch_without_address() -> Watch | None:
    """Starts the watch of a cluster that only JAX has detected; None, with a warning, if it cannot."""
    own, token, listener = "0.0.0.0", secrets.token_bytes(32), None  # nobody can connect to this address
    if first():
        with contextlib.suppress(OSError):
            own = socket.gethostbyname(socket.gethostname())
            listener = meeting.listen("" if own.startswith("127.") else own, 0)
    port = listener.getsockname()[1] if listener is not None else 0
    sent = multihost_utils.broadcast_one_to_all(
        np.frombuffer(socket.inet_aton(own) + port.to_bytes(2, "big") + token, np.uint8)
    )
    told = bytes(np.asarray(sent, np.uint8))
    address, token = f"{socket.inet_ntoa(told[:4])}:{int.from_bytes(told[4:6], 'big')}", told[6:]
    if listener is not None:
        return Watch(0, _processes, token, listener, patience=SILENCE / 2)
    try:
        peer, answer = meeting.knock(address, _process, _processes, token, attempts=3)
    except (OSError, meeting.RefusedError) as e:
        log.warning(
            "process %d: cannot watch the other processes (%s); JAX notices later that one is gone", _process, e
        )
        return None
    return Watch(_process, _processes, token, first=(peer, answer.name))


def processes() -> int:
    """The number of processes that run this job. Does not start JAX."""
    return _processes


def process() -> int:
    """This process's number, from 0. Does not start JAX."""
    return _process


def first() -> bool:
    """Whether this process is process 0, which writes and prints. Does not start JAX."""
    return _process == 0


def max_over_processes(value: int) -> int:
    """The largest `value` of all processes, int32. All processes must call it."""
    if _processes == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def sum_over_processes(value: int) -> int:
    """The sum of the `value` of all processes, each int32. All processes must call it."""
    if _processes == 1:
        return value
    gathered = multihost_utils.process_allgather(np.int32(value))
    return int(np.sum(gathered, dtype=np.int64))


def barrier(name: str) -> None:
    """Waits until all processes have called it with this `name`."""
    if _processes > 1:
        multihost_utils.sync_global_devices(name)


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes as one array, the rows of process 0 first. All processes must call it.

    Args:
      rows: this process's rows (n, ...); n may differ between processes.

    Returns:
      (sum of n, ...), the same array in every process.
    """
    if _processes == 1:
        return rows
    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(rows))))
    padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([part[:n] for part, n in zip(everyone, counts, strict=True)])


def run_in_first(act: Callable[[], T]) -> T | None:
    """Runs `act` in process 0 only. All processes must call it.

    Returns:
      what `act` returned in process 0; None in the others.

    Raises:
      UserError: in every process, if `act` raised a UserError or an OSError. Process 0 raises the error itself.
    """
    if _processes == 1:
        return act()
    result: T | None = None
    error: Exception | None = None
    if first():
        try:
            result = act()
        except (UserError, OSError) as e:
            error = e
    message = text_of_first("" if error is None else str(error))
    if error is not None:
        raise error
    if message:
        raise UserError(message)
    return result


def text_of_first(text: str) -> str:
    """Process 0's `text`, cut to MAX_MESSAGE_BYTES bytes. All processes must call it."""
    if _processes == 1:
        return text
    own = text.encode()[:MAX_MESSAGE_BYTES].ljust(MAX_MESSAGE_BYTES, b"\0")
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(own, np.uint8))
    return bytes(np.asarray(sent, np.uint8)).rstrip(b"\0").decode(errors="ignore")


def leave(status: int) -> NoReturn:
    """Ends this process after a failure, and the others with the same status.

    JAX's own exit handlers do not run, since they would wait for the other processes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log's disk is full
            stream.flush()
    if _watch is not None:
        _watch.end()
    time.sleep(GRACE_SECONDS)
    if _watch is not None:
        _watch.tell_failure(status)
    os._exit(status)


def leave_last() -> NoReturn:
    """Ends this process after an unforeseen failure, which another process that failed before may have caused.

    Waits so long that the watch can notice the other process first, and name it.
    """
    time.sleep(SILENCE if _watch is not None else 0)
    leave(1)


def unwatch() -> None:
    """Ends the watch: from now on processes may end at any time."""
    if _watch is not None:
        _watch.end()
        _watch.tell(BYE)
