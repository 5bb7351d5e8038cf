"""Several processes: how they find each other, and that together they are one run. Real processes, over gloo."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import chex
import numpy as np
import pytest

from crate_jax.errors import ConfigError
from crate_jax.jobs import train
from crate_jax.methods import METHODS
from crate_jax.parallel import distributed, meeting, watch
from crate_jax.parallel.distributed import Cluster
from crate_jax.workdir import checkpoint, pictures
from tests.conftest import ROOT

SLURM = {"SLURM_JOB_ID": "70000", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "gpu[007-010],x1"}
NAMED = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_RANK": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HERE = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "4"}
MPICH = {"PMI_SIZE": "6", "PMI_RANK": "4", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}
PBS = {"PBS_JOBID": "5000[2].server", "PBS_NODEFILE": "HOSTS"}
LSF = {"LSB_JOBID": "9", "LSB_HOSTS": "c3 c3 c4"}
FOUND = {
    "nothing": ({}, None),
    "environment": (NAMED, Cluster("a:1", 2, 1)),
    "indexed job": (
        {"JAX_COORDINATOR_ADDRESS": "job-0.svc:9", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"},
        Cluster("job-0.svc:9", 8, 5),
    ),
    "an indexed job of single processes": ({"JOB_COMPLETION_INDEX": "5"}, None),
    "one process": ({"JAX_NUM_PROCESSES": "1"}, None),
    "slurm, one task per node": (SLURM, Cluster("gpu007:61808", 4, 3)),
    "slurm, a task per device": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
        Cluster("gpu007:61808", 4, 3, 1),
    ),
    "slurm, each with its own device": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"},
        Cluster("gpu007:61808", 4, 3),
    ),
    "slurm, one task": (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    "slurm, outside a step": ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
    "named inside slurm": (SLURM | NAMED, Cluster("a:1", 2, 1)),
    "an address inside slurm": (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:7"}, Cluster("b:7", 4, 3)),
    "open mpi, one host": (HERE, Cluster("127.0.0.1:61440", 6, 4, 4)),
    "open mpi, an address": (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "b:7"}, Cluster("b:7", 6, 4, 1)),
    "open mpi in pbs": (OPEN_MPI | PBS, Cluster("n7.cluster:62344", 6, 4, 1)),
    "mpich in lsf, one process per host": (MPICH | LSF, Cluster("c3:61449", 6, 4)),
    "lsf names its hosts in a file": (
        MPICH | {"LSB_JOBID": "9", "LSB_DJOB_HOSTFILE": "HOSTS"},
        Cluster("n7.cluster:61449", 6, 4),
    ),
    "cray": (
        {"PMI_SIZE": "6", "PMI_RANK": "4", "PMI_LOCAL_SIZE": "3", "PMI_LOCAL_RANK": "1"} | LSF,
        Cluster("c3:61449", 6, 4, 1),
    ),
    # What mpirun's processes see in a batch script of SLURM 22.05: SLURM_PROCID is the script's, or that of a helper.
    "open mpi in slurm": (
        OPEN_MPI | {"SLURM_JOB_ID": "70000", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "x[3,7]"},
        Cluster("x3:61808", 6, 4, 1),
    ),
    "mpich in slurm": (SLURM | MPICH, Cluster("gpu007:61808", 6, 4)),
    "one process of mpirun": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
}


@pytest.mark.parametrize("where", FOUND)
def test_processes_are_found_in_the_environment(where, tmp_path):
    environ, cluster = FOUND[where]
    (tmp_path / "hosts").write_text("n7.cluster\nn7.cluster\nn8.cluster\n")
    environ = {name: str(tmp_path / "hosts") if value == "HOSTS" else value for name, value in environ.items()}
    assert distributed.find(environ) == cluster


def test_mpirun_on_several_hosts_without_a_batch_system_needs_an_address():
    with pytest.raises(ConfigError, match=r"missing: --coordinator_address \(JAX_COORDINATOR_ADDRESS\)"):
        distributed.find(OPEN_MPI)


def test_jax_detects_where_a_flag_says_so():
    assert distributed.find(SLURM | NAMED, method="mpi4py") == Cluster(method="mpi4py")
    with pytest.raises(ConfigError, match="--cluster_detection_method=k8s: JAX then finds"):
        distributed.find({}, "a:1", method="k8s")


def test_flags_come_before_the_environment():
    assert distributed.find(NAMED, "b:2", 4, 0) == Cluster("b:2", 4, 0)
    assert distributed.find(NAMED, process=0) == Cluster("a:1", 2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", 2, -1), "missing: --process_id"),
        (("", 2, 0), "missing: --coordinator_address"),
        (("a:1", 0, 0), "missing: --num_processes"),
        (("a", 2, 0), "must be HOST:PORT of process 0"),
        (("a:65536", 2, 0), "='a:65536': must be HOST:PORT of process 0, with a PORT up to 65535"),
        (("a:0", 2, 0), "with a PORT up to 65535"),
        (("a:1", 65536, 0), "--num_processes=65536: must be at most 65535"),
        (("a:1", 2, 2), "--process_id=2: must be below --num_processes=2"),
    ],
)
def test_incomplete_or_wrong_flags_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        distributed.find({}, *flags)


LONG = "1" * 5000  # digits; Python reads no number of more than 4300


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (NAMED | {"JAX_NUM_PROCESSES": LONG}, "^JAX_NUM_PROCESSES='1{199}...: must be a whole number of at most 9 dig"),
        (NAMED | {"JAX_PROCESS_ID": LONG}, "^JAX_PROCESS_ID='1{199}...: must be a whole number of at most 9 digits"),
        (HERE | {"OMPI_COMM_WORLD_SIZE": LONG}, "^OMPI_COMM_WORLD_SIZE='1{199}...: must be a whole number of at most"),
        (HERE | {"OMPI_COMM_WORLD_RANK": "x"}, "^OMPI_COMM_WORLD_RANK='x': must be a whole number$"),
        (HERE | {"OMPI_COMM_WORLD_RANK": "6"}, "^OMPI_COMM_WORLD_RANK=6: must be below OMPI_COMM_WORLD_SIZE=6, coun"),
        (NAMED | {"JAX_NUM_PROCESSES": "two"}, "^JAX_NUM_PROCESSES='two': must be a whole number$"),
        (NAMED | {"JAX_COORDINATOR_ADDRESS": "a"}, "^JAX_COORDINATOR_ADDRESS='a': must be HOST:PORT of process 0"),
    ],
)
def test_a_wrong_variable_is_named_as_the_one_that_was_read(environ, message):
    with pytest.raises(ConfigError, match=message.replace("...", r"\.\.\.")):
        distributed.find(environ | {"JOB_COMPLETION_INDEX": "0"})
    index = {name: value for name, value in NAMED.items() if name != "JAX_PROCESS_ID"}
    with pytest.raises(ConfigError, match="^JOB_COMPLETION_INDEX=2: must be below JAX_NUM_PROCESSES=2"):
        distributed.find(index | {"JOB_COMPLETION_INDEX": "2"})


def test_long_numbers_of_a_job_and_on_a_host_do_no_harm():
    assert distributed.find(SLURM | {"SLURM_JOB_ID": LONG}) == Cluster("gpu007:64455", 4, 3)
    assert distributed.find(HERE | {"OMPI_COMM_WORLD_LOCAL_RANK": LONG}) == Cluster("127.0.0.1:61440", 6, 4)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def spawned(commands: Sequence[Sequence[str]], env: dict) -> Iterator[list[subprocess.Popen]]:
    """Processes on this machine; killed at the end, whatever happened."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def started(cli_env: dict, count: int, flags: Sequence[str], devices: int = 2) -> Iterator[list[subprocess.Popen]]:
    """`count` processes of one job."""
    common = [sys.executable, "-m", "crate_jax.main", *flags, f"--coordinator_address=127.0.0.1:{free_port()}"]
    commands = [[*common, f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
    with spawned(commands, cli_env | {"JAX_NUM_CPU_DEVICES": str(devices)}) as processes:
        yield processes


def ends(processes: list[subprocess.Popen], timeout: float = 200) -> list[tuple[int, str, str]]:
    """Status, output and errors of each, once all have ended."""
    deadline, out = time.monotonic() + timeout, []
    for process in processes:
        stdout, stderr = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        out.append((process.returncode, stdout, stderr))
    return out


def test_the_sum_over_processes_is_that_of_all(monkeypatch):
    """It may be larger than an int32."""
    assert distributed.sum_over_processes(7) == 7
    monkeypatch.setattr(distributed, "_processes", 3)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda x: np.array([x, 2**31 - 1, 2], "int32")
    )
    assert distributed.sum_over_processes(7) == 2**31 + 8


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# One block and a linear decoder: soon compiled.
SMALL = {"encoder.depth": 1, "decoder.name": "linear", "encoder.patch_size": 8}


def configured(encoder: str, steps: int, **keys: object) -> tuple[object, list[str]]:
    """A config with kernels large enough to be split, and the flags that make it."""
    corruption = {"crate": "mask", "vit": "rop"}[encoder]
    arg = f"encoder={encoder},corruption={corruption},debug"
    values = {"steps": steps, "data.source": "digits", "encoder.width": 128, "log.every": 1, "log.pictures": 2, **keys}
    config = importlib.import_module("configs.cifar10").get_config(arg)
    for key, value in values.items():
        *section, leaf = key.split(".")
        (config[section[0]] if section else config)[leaf] = value
    return config, [f"--config=configs/cifar10.py:{arg}", *(f"--config.{k}={v}" for k, v in values.items())]


@functools.cache
def alone(encoder: str, steps: int, workdir: Path) -> None:
    """The same run in this process, on its eight devices."""
    train.run(configured(encoder, steps)[0], str(workdir))


def check_equal(workdir: Path, reference: Path) -> None:
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-5)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (workdir, reference))
    if theirs["knn_top1"] is not None:
        for name in ("knn_top1", "knn_top1_untrained", "probe_top1_pixels"):
            assert ours[name] == pytest.approx(theirs[name], abs=0.02), name
        assert ours["rankme"] == pytest.approx(theirs["rankme"], rel=1e-3)
    params = checkpoint.read_params(workdir)[0]
    assert checkpoint.params_sha256(params) == ours["params_sha256"]


@pytest.mark.slow
def test_a_checkpoint_that_one_process_lacks_ends_all_with_a_line(cli_env, tmp_path):
    """Each has a view of its own of a disk: here, a path of its own."""
    train.run(configured("crate", 1, **SMALL)[0], str(tmp_path / "run"))
    common = [sys.executable, "-m", "crate_jax.main", "--config=configs/evaluate.py:protocol=knn,debug"]
    common += [f"--workdir={tmp_path / 'out'}", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    commands = [
        [*common, f"--process_id={i}", f"--config.checkpoint={path}", "--config.data.source=digits"]
        for i, path in enumerate((tmp_path / "run", tmp_path / "none"))
    ]
    with spawned(commands, cli_env) as processes:
        ended = ends(processes, 100)
    assert [status for status, _, _ in ended] == [2, 2], ended[0][2][-2000:]
    assert f"error: {tmp_path / 'none'}: no such folder" in ended[1][2]
    assert "error: process 1 of 2 (" in ended[0][2] and "failed with status 2" in ended[0][2]


@pytest.mark.slow
def test_two_processes_with_split_parameters_are_one_run(cli_env, tmp_path):
    """The losses of a single process on eight devices, and one run's files; only process 0 writes and prints."""
    for i in range(32):  # without labels, so that no classifier is fitted on them
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        pictures.save_png(tmp_path / "images" / f"{i}.png", pixels)
    config, flags = configured("crate", 4, **SMALL, **{"data.source": f"folder:{tmp_path / 'images'}"})
    flags = [*flags, "--config.mesh.data=1", "--config.mesh.model=0", "--config.log.parameters"]
    with started(cli_env, 2, [*flags, f"--workdir={tmp_path / 'two'}"]) as processes:
        train.run(config, str(tmp_path / "one"))
        (first, out, log), (second, silent, quiet) = ends(processes)
    assert (first, second) == (0, 0), log[-3000:] + quiet[-3000:]
    check_equal(tmp_path / "two", tmp_path / "one")
    assert "parameters" in out and "mesh of 1 (data) x 4 (model) devices" in log and "axis 0 in 4" in log
    assert "process 1 of 2: " in log and "parameters" not in silent and " I " not in quiet, quiet


@pytest.mark.parametrize("encoder", ["crate", "vit"])
@pytest.mark.parametrize(("count", "mesh"), [(2, "data"), (2, "model"), (4, "data"), (4, "model"), (4, "hybrid")])
@pytest.mark.slow
def test_any_number_of_processes_gives_the_losses_of_one(encoder, count, mesh, cli_env, tmp_path_factory):
    """20 steps to 1e-5, data parallel, fully sharded and hybrid."""
    reference = tmp_path_factory.getbasetemp() / f"alone_{encoder}"
    alone(encoder, 20, reference)
    data, model = {"data": (0, 1), "model": (1, 0), "hybrid": (0, 2)}[mesh]
    workdir = tmp_path_factory.mktemp("several") / "run"
    flags = [f"--config.mesh.data={data}", f"--config.mesh.model={model}", f"--workdir={workdir}"]
    with started(cli_env, count, [*configured(encoder, 20)[1], *flags]) as processes:
        ended = ends(processes, 500)
    assert [status for status, _, _ in ended] == [0] * count, ended[0][2][-3000:]
    check_equal(workdir, reference)


CARRYING = [name for name, row in METHODS.items() if "joint" in row.parts]


@pytest.mark.parametrize("name", CARRYING)
@pytest.mark.slow
def test_two_processes_carry_what_one_carries(name, cli_env, tmp_path):
    """Queues, centres, memories, targets and statistics: after 3 steps and a restart with one process, 6 steps.

    Bits differ, since sums have other orders. The rate is small, so that this stays rounding: a ReLU at zero makes of
    one bit a gradient that is other by 2e-3, and a large rate carries it into the next losses. W-MSE has Adam, which
    makes steps of the rate's size out of the rounding of a gradient that is 0, that of biases before a norm.
    """
    for i in range(48):  # without labels, so that no classifier is fitted on them
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        pictures.save_png(tmp_path / "images" / f"{i}.png", pixels)
    flags = [f"--config=configs/joint.py:method={name},debug", f"--config.data.source=folder:{tmp_path / 'images'}"]
    flags += ["--config.log.every=1", "--config.log.report=False", "--config.log.pictures=0", "--config.save.every=3"]
    flags += ["--config.deepclusterv2.prototypes=6,5", "--config.optimizer.schedule=constant"]
    flags += ["--config.optimizer.lr=0.001"]
    flags += ["--config.joint.tau_final=0.99"]  # as at the start: the first of the two runs knows of three steps only
    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, "-m", "crate_jax.main", *flags, "--config.steps=6"]
    with spawned([[*command, f"--workdir={one}"]], cli_env | {"JAX_NUM_CPU_DEVICES": "4"}) as processes:
        with started(cli_env, 2, [*flags, "--config.steps=3", f"--workdir={two}"]) as several:
            assert [status for status, _, _ in ends(several, 500)] == [0, 0]
        assert [status for status, _, _ in ends(processes, 500)] == [0]
    assert (
        subprocess.run([*command, f"--workdir={two}"], cwd=ROOT, env=cli_env, timeout=500, check=False).returncode == 0
    )
    np.testing.assert_allclose(losses(two), losses(one), rtol=5e-4, atol=2e-6)
    states = [checkpoint.read_params(workdir)[0] for workdir in (two, one)]
    chex.assert_trees_all_close(*states, rtol=1e-3, atol=1e-3 if name == "wmse" else 3e-4)


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_stop_and_name_a_process_that_is_killed(victim, cli_env, tmp_path):
    """Within a minute, with its number; and the run goes on in one process, from the last checkpoint, the same."""
    flags = [*configured("crate", 60, **{"save.every": 5})[1], "--config.mesh.model=2"]
    with started(cli_env, 2, [*flags, f"--workdir={tmp_path / 'run'}"]) as processes:
        wait_for(lambda: steps_done(tmp_path / "run") > 12, processes)
        processes[victim].kill()
        status, _, stderr = ends(processes, 60)[1 - victim]
    assert status == watch.LOST, stderr[-3000:]
    line = [line for line in stderr.splitlines() if line.startswith("error: ")][-1]
    assert f"process {victim} of 2" in line and f"pid {processes[victim].pid}" in line
    config, _ = configured("crate", 60)
    train.run(config, str(tmp_path / "run"))
    alone("crate", 60, tmp_path / "one")
    check_equal(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all_and_another_number_of_them_continues(cli_env, tmp_path):
    flags = configured("crate", 60, **{"save.every": 1000})[1]
    with started(cli_env, 2, [*flags, f"--workdir={tmp_path / 'run'}"]) as processes:
        wait_for(lambda: steps_done(tmp_path / "run") > 3, processes)
        processes[1].send_signal(signal.SIGTERM)
        ended = ends(processes)
    assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended[0][2][-3000:]
    step = int(ended[0][2].split("at step ")[1].split(",")[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    with started(cli_env, 4, [*flags, "--config.mesh.model=4", f"--workdir={tmp_path / 'run'}"]) as processes:
        ended = ends(processes, 500)
    assert [status for status, _, _ in ended] == [0] * 4 and f"continuing from step {step}" in ended[0][2]
    alone("crate", 60, tmp_path / "one")
    check_equal(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_what_stops_one_process_stops_all_in_one_line(cli_env, tmp_path):
    """A workdir in use, which only process 0 sees; and a bad config, which all see."""
    flags = configured("crate", 100_000)[1]
    holder = subprocess.Popen(
        [sys.executable, "-c",
         f"import time; from crate_jax.workdir.folder import lock\nwith lock({str(tmp_path)!r}):\n"
         " print('held', flush=True); time.sleep(600)"], cwd=ROOT, env=cli_env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for workdir, extra, message in (
            (tmp_path, [], "is in use by process"),
            (tmp_path / "other", ["--config.batch_size=6"], "cannot be split over"),
        ):
            with started(cli_env, 2, [*flags, *extra, f"--workdir={workdir}"]) as processes:
                ended = ends(processes, 120)
            for status, _, stderr in ended:
                assert status == 2 and "Traceback" not in stderr, stderr[-3000:]
                errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
                assert len(errors) == 1 and message in errors[0]
    finally:
        holder.kill()
        holder.wait()


# JAX would read address, number and processes from the TPU's metadata.
FAILING = """
import sys, time
import jax
from crate_jax.parallel import distributed
address, process, initialize = sys.argv[1], int(sys.argv[2]), jax.distributed.initialize
jax.distributed.initialize = lambda *_, **options: initialize(address, 3, process)
distributed.start(distributed.Cluster())
if process == 1:
    distributed.leave(2)
time.sleep(60)
"""


def test_a_process_that_fails_ends_the_others_with_its_own_status(cli_env):
    """So that a launcher does not try a mistake again. Process 2 hears of it from process 0. They have no address."""
    address = f"127.0.0.1:{free_port()}"
    with spawned([[sys.executable, "-c", FAILING, address, str(i)] for i in range(3)], cli_env) as processes:
        ended = ends(processes, 50)
    assert [status for status, _, _ in ended] == [2, 2, 2], ended
    for i in (0, 2):
        line = ended[i][2].splitlines()[-1]
        assert line.startswith("error: process 1 of 3 (") and f"pid {processes[1].pid}) failed with status 2" in line


MEETING = """
import sys, time
from crate_jax.parallel import distributed, watch
watch.BEAT, watch.SILENCE = 0.5, 3.0
distributed.start(distributed.Cluster(sys.argv[1], 2, int(sys.argv[2])))
distributed.barrier("all are there")
print("met", flush=True)
time.sleep(60)
"""


LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")  # 127.0.0.1 in /proc/net


def listening(pid: int) -> set[str]:
    """ADDRESS:PORT, as in /proc/net, at which a process listens."""
    inodes = {os.readlink(path)[8:-1] for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1] for line in lines if line[3] == "0A" and line[9] in inodes}


@pytest.mark.slow
def test_second_starts_are_refused_and_a_stopped_process_is_named(cli_env):
    """JAX's service believes them, and aborts both healthy processes with a stack."""
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-c", MEETING, address, str(i)] for i in range(2)]
    with spawned(commands, cli_env) as healthy:
        for process in healthy:
            assert "met\n" in iter(process.stdout.readline, "")
        places = listening(healthy[0].pid)  # the meeting point, JAX's service, gloo
        assert len(places) > 1 and all(place.startswith(LOOPBACK) for place in places), places
        with spawned(commands, cli_env) as second:
            ended = ends(second, 50)
        for i in range(2):
            line = ended[i][2].splitlines()[-1]
            assert f"process {i} of 2 cannot join the others at {address}: it is already there (" in line
            assert f"pid {healthy[i].pid})" in line
        assert all(status for status, _, _ in ended) and all(process.poll() is None for process in healthy)
        healthy[1].send_signal(signal.SIGSTOP)
        assert healthy[0].wait(20) == watch.LOST
        line = healthy[0].communicate()[1].splitlines()[-1]
        assert line.startswith("error: process 1 of 2 (") and "has been silent for 3 s: it is stopped or hangs" in line
        healthy[1].send_signal(signal.SIGCONT)
        assert healthy[1].wait(20) == watch.LOST
        assert f"error: process 0 of 2 ({meeting.own_name().split()[0]}" in healthy[1].communicate()[1]


@pytest.mark.parametrize(("process", "role"), [(0, "starts the meeting point at"), (1, "looks for process 0 at")])
@pytest.mark.slow
def test_a_process_that_stays_alone_says_so(process, role, cli_env):
    program = (
        "from crate_jax.parallel import distributed as d; "
        f"d.start(d.Cluster('127.0.0.1:{free_port()}', 2, {process}), 3)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=cli_env, capture_output=True, text=True, timeout=100)
    assert result.returncode == watch.LOST  # a late one, most often: launchers try again
    assert result.stderr.splitlines()[-1].startswith(f"error: process {process} of 2 {role} 127.0.0.1:")
