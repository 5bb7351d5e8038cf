"""launch/: what each script asks of gcloud, sbatch, srun and kubectl, and real processes under local.sh."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.parallel.test_distributed import free_port

pytestmark = pytest.mark.one_python

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "settings.sh")
TOOLS = ("gcloud", "sbatch", "srun", "squeue", "scontrol", "kubectl", "python3")

# Writes what it was asked as one line of RECORD, then does the little that the scripts need of the real one.
STAND_IN = r"""#!/usr/bin/env bash
printf -v line '%q ' "${0##*/}" "$@"
printf '%s\n' "${line% }" >>"$RECORD"
case "${0##*/} $*" in
  'gcloud compute tpus queued-resources list'*) head -n 1 "$HOME/states"; sed -i 1d "$HOME/states" ;;
  'gcloud compute tpus tpu-vm scp'*) cp "$5" "$HOME/crate_jax.tar.gz" ;;
  'gcloud compute tpus tpu-vm ssh'*)
    cd && for argument in "$@"; do [[ $argument != --command=* ]] || bash -c "${argument#*=}"; done ;;
  'kubectl create'*) cat >"$HOME/manifest" ;;
  srun*) [[ $CRATE_JAX_TOKEN =~ ^[0-9a-f]{32}$ ]] && exit "${SRUN_STATUS:-0}" ;;
  squeue*) echo "${STATE:-RUNNING}" ;;
esac
"""

# Stands for crate_jax.main: says what it was given, fails or ends on request, else runs until a signal stops it.
PROGRAM = f"""#!{sys.executable} -SE
import os, signal, sys, time
number = sys.argv[-1].rpartition("=")[2]
def stop(signum, frame):
    time.sleep(0.2)  # a save
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if "child" in sys.argv and os.fork() == 0:  # outlives its parent, unless someone ends it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
shown = [os.environ.get(name, "-") for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")]
os.write(1, ("\\t".join([number, str(os.getpid()), *shown, *sys.argv[1:]]) + "\\n").encode())
for argument in sys.argv:
    if argument.startswith(f"fail{{number}}="):
        time.sleep(0.2 + int(number) / 2)
        sys.exit(int(argument.partition("=")[2]))
if "end" not in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def env(tmp_path):
    """An environment with the stand-ins first on the PATH, none of the caller's settings, and a home of its own."""
    for tool in TOOLS:
        (tmp_path / "bin" / tool).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).write_text(STAND_IN)
        (tmp_path / "bin" / tool).chmod(0o755)
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": f"{tmp_path}/home",
        "TMPDIR": str(tmp_path),
        "RECORD": f"{tmp_path}/record",
    }


def launch(env, script, *args, folder=LAUNCH, **settings):
    """Runs a script to its end."""
    environment = env | {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        [str(folder / script), *args], env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=60
    )


def words(lines):
    """The words of each line, as a shell reads it."""
    return [shlex.split(line) for line in lines]


def recorded(env):
    """What the stand-ins were asked since the last call, one line each."""
    path = Path(env["RECORD"])
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(env, script):
    shown = launch(env, script, "--help")
    top = (LAUNCH / script).read_text().split("\n")[1].removeprefix("# ")
    assert shown.returncode == 0 and shown.stdout.startswith(top) and len(shown.stdout.splitlines()) > 5
    assert "shellcheck" not in shown.stdout and "#" not in shown.stdout
    assert recorded(env) == []


def test_an_older_bash_is_one_line_and_status_2(env, tmp_path):
    """CentOS 7 has 4.2, macOS has 3.2: there, later statements fail in the middle of the work, or cannot be read."""
    source = f'source {LAUNCH}/settings.sh; for v in "3 2" "4 2" "4 3" "4 4" "5 0" "5 3"; do'
    done = subprocess.run(
        ["bash", "-c", f"{source} is_new_enough $v && echo $v; done || true"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["4 4", "5 0", "5 3"], done
    # Here no bash is older, so it is the oldest one wanted that changes.
    shutil.copytree(LAUNCH, tmp_path / "launch")
    settings = tmp_path / "launch" / "settings.sh"
    settings.write_text(settings.read_text().replace("(($1 > 4 ||", "(($1 > 94 ||").replace("$1 == 4", "$1 == 94"))
    version = subprocess.run(["bash", "-c", "echo $BASH_VERSION"], capture_output=True, text=True).stdout
    for script in set(SCRIPTS) - {"slurm_job.sh"}:  # which runs on the nodes, with the bash that they have
        done = launch(env, script, "--help", folder=tmp_path / "launch")
        wanted = f"{script}: needs bash 4.4 or newer, this is {version}"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)
    # Nothing that an older bash cannot do stands before it.
    for script in [*SCRIPTS, "settings.sh"]:
        code = [x for x in (LAUNCH / script).read_text().splitlines() if x and not x.startswith("#")]
        if script == "settings.sh":
            assert code[0].startswith("is_new_enough() { ") and code[1].startswith("if ! is_new_enough ")
        elif script != "slurm_job.sh":
            assert code[0] == 'source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"'


TPU = {"PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v5litepod-16"}
SLURM = {"NODES": 2, "GPUS": 8}
KUBERNETES = {"IMAGE": "images/crate:1", "CLAIM": "runs", "CRATE_JAX_TOKEN": 'known"'}
GKE = KUBERNETES | {"ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}


@pytest.mark.parametrize(
    "command, settings, said",
    [
        ("tpu.sh", TPU, "no command"),
        ("tpu.sh creat", TPU, "creat: must be one of up"),
        ("tpu.sh create now", TPU, "create takes no argument"),
        ("tpu.sh create", TPU | {"PROJECT": ""}, "PROJECT is not set"),
        ("tpu.sh run", {"PROJECT": "p"}, "ZONE is not set"),
        ("tpu.sh create", {"PROJECT": "p", "ZONE": "z"}, "ACCELERATOR is not set"),
        ("tpu.sh up", TPU | {"ACCELERATOR": "v5e-16"}, "ACCELERATOR=v5e-16: must be v5litepod-N"),
        ("tpu.sh create", TPU | {"ACCELERATOR": "v6e-0"}, "ACCELERATOR=v6e-0"),
        ("tpu.sh create", TPU | {"SPOT": "yes"}, "SPOT=yes: must be 0 or 1"),
        ("tpu.sh create", TPU | {"SLICES": 0}, "SLICES=0: must be a whole number, 1 or more"),
        ("tpu.sh create", TPU | {"NAME": "a b"}, "NAME=a b: must be lower-case"),
        ("tpu.sh create", TPU | {"SPOT": 1, "FLEX_START": "4h"}, "SPOT=1 and FLEX_START=4h: must be one or the other"),
        ("tpu.sh create", TPU | {"FLEX_START": "4"}, "FLEX_START=4: must be a time as in 4h"),
        ("tpu.sh create", TPU | {"CREATE_ARGS": "--tags='a"}, "CREATE_ARGS=--tags='a: must be options"),
        ("tpu_worker.sh", {}, "no command"),
        ("slurm.sh", {"GPUS": 8}, "NODES is not set"),
        ("slurm.sh", {"NODES": 2}, "GPUS is not set"),
        ("slurm.sh", SLURM | {"NODES": 0}, "NODES=0"),
        ("slurm.sh", SLURM | {"GPUS": "08"}, "GPUS=08"),
        ("slurm.sh", SLURM | {"TIME": "1 day"}, "TIME=1 day: must be"),
        ("slurm.sh", SLURM | {"LEAD": 99999}, "LEAD=99999"),
        ("slurm.sh", SLURM | {"PYXIS": "a", "APPTAINER": "b"}, "PYXIS=a and APPTAINER=b: must be one or the other"),
        ("slurm.sh", SLURM | {"MOUNTS": "/data"}, "MOUNTS=/data: needs a container"),
        ("slurm.sh", SLURM | {"GPUS": 0, "GRES": "gpu:2"}, "GRES=gpu:2 and GPUS=0"),
        ("slurm.sh", SLURM | {"EXCLUSIVE": "yes"}, "EXCLUSIVE=yes: must be 0 or 1"),
        ("kubernetes.sh", KUBERNETES, "no command"),
        ("kubernetes.sh run", KUBERNETES, "HOSTS is not set"),
        ("kubernetes.sh run", {"HOSTS": 1, "IMAGE": "i"}, "CLAIM is not set"),
        ("kubernetes.sh run", {"HOSTS": 1, "CLAIM": "c"}, "IMAGE is not set"),
        ("kubernetes.sh run", KUBERNETES | {"HOSTS": 0}, "HOSTS=0"),
        ("kubernetes.sh run", GKE | {"ACCELERATOR": "v5e"}, "ACCELERATOR=v5e: must be tpu-v5-lite-podslice"),
        ("kubernetes.sh run", GKE | {"TOPOLOGY": ""}, "TOPOLOGY is not set"),
        ("kubernetes.sh run", GKE | {"TOPOLOGY": "16"}, "TOPOLOGY=16: must be like 4x4"),
        ("kubernetes.sh run", GKE | {"HOSTS": 3}, "HOSTS=3: TOPOLOGY=4x4 has 4 hosts of 4 chips"),
        ("kubernetes.sh run", GKE | {"GPUS": 8}, "must be one or the other"),
        ("kubernetes.sh run", KUBERNETES | {"HOSTS": 2, "SLICES": 2}, "only TPUs have slices"),
        ("local.sh", {}, "N is not set"),
        ("local.sh", {"N": 0}, "N=0: must be a whole number, 1 or more"),
        ("local.sh", {"N": "two"}, "N=two"),
        ("local.sh", {"N": 2, "CUDA_VISIBLE_DEVICES": "0,1,2"}, "3 GPUs cannot be cut into N=2 equal parts"),
        ("local.sh", {"N": 2, "JAX_NUM_CPU_DEVICES": 0}, "JAX_NUM_CPU_DEVICES=0"),
        ("local.sh", {"N": 2, "MIN": 3}, "MIN=3: must be at most N=2"),
        ("local.sh", {"N": 2, "RESTARTS": "often"}, "RESTARTS=often"),
        ("local.sh", {"N": 2, "PORT": 70000}, "PORT=70000: must be at most 65535"),
        ("local.sh", {"N": 2, "PYTHON": "no-such-python"}, "PYTHON=no-such-python: no such command"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(env, command, settings, said):
    done = launch(env, *command.split(), **settings)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert done.stderr.startswith(command.split()[0] + ": ") and said in done.stderr
    assert recorded(env) == []


ARGS = ("--config=configs/cifar10.py:debug", "--config.data.source=folder:/a b/it's", "--workdir=/$HOME/(x)")


@pytest.mark.parametrize(
    "script, args, settings",
    [
        ("slurm.sh", ARGS, SLURM | {"TIME": "1-00:00:00", "PARTITION": "gpu", "CPUS": 8, "MEMORY": "200G"}),
        ("slurm.sh", ARGS, {"NODES": 1, "GPUS": 0}),
        (
            "slurm.sh",
            ARGS,
            SLURM | {"GRES": "gpu:a100:8", "EXCLUSIVE": 1, "SBATCH_ARGS": "--mail-type=END -x 'n[1-3]'"},
        ),
        ("slurm_job.sh", ARGS, {"SLURM_CPUS_PER_TASK": 8}),
        ("slurm_job.sh", ARGS, {"SLURM_CPUS_PER_TASK": 8, "PYXIS": "nvcr.io#nvidia/jax", "MOUNTS": "/data,/a:/b"}),
        ("tpu.sh", ["stop"], TPU | {"SLICES": 2}),
        ("tpu.sh", ["logs"], TPU | {"WORKER": 3}),
        ("tpu.sh", ["delete"], TPU),
        ("tpu.sh", ["stop"], TPU | {"INTERNAL_IPS": 1}),
        ("tpu.sh", ["create"], TPU | {"SPOT": 1, "RUNTIME": "other"}),
        ("kubernetes.sh", ["logs"], {"WORKER": 1, "NAMESPACE": "team"}),
        ("kubernetes.sh", ["delete"], {}),
    ],
)
def test_dry_run_prints_what_is_run_and_runs_nothing(env, script, args, settings):
    shown = launch(env, script, "--dry-run", *args, **settings)
    assert shown.returncode == 0 and shown.stderr == "" and recorded(env) == []
    (Path(env["HOME"]) / "states").write_text("\nACTIVE\tv5litepod-16\n")
    launch(env, script, *args, **settings)
    assert words(recorded(env)) == words(shown.stdout.splitlines()) != []


def test_slurm_asks_for_a_process_per_gpu_and_a_signal_to_them(env):
    launch(env, "slurm.sh", *ARGS, **SLURM, LEAD=600)
    asked = shlex.split(recorded(env)[0])
    assert asked[0] == "sbatch" and asked[-4].endswith("launch/slurm_job.sh") and tuple(asked[-3:]) == ARGS
    wanted = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@600", "--requeue"}
    assert wanted | {"--open-mode=append", "--export=ALL,NCCL_DEBUG=WARN"} <= set(asked)
    launch(env, "slurm.sh", *ARGS, **SLURM | {"GPUS": 0}, NCCL_DEBUG="INFO")
    launch(env, "slurm.sh", *ARGS, **SLURM, NCCL_DEBUG="INFO")
    assert ["NCCL_DEBUG=INFO" in line for line in recorded(env)] == [False, True]


def test_slurm_for_sites_with_other_habits(env):
    """GPUs by --gres, whole nodes, any other option; last, so that they count more than ours."""
    settings = SLURM | {"GRES": "gpu:a100:8", "EXCLUSIVE": 1, "SBATCH_ARGS": "--nodes=3 --comment='a b' -x n[1-3]"}
    launch(env, "slurm.sh", *ARGS, **settings)
    asked = shlex.split(recorded(env)[0])
    assert {"--gres=gpu:a100:8", "--exclusive", "--ntasks-per-node=8"} <= set(asked)
    assert not [word for word in asked if word.startswith("--gpus-per-node")]
    assert asked[-8:-4] == ["--nodes=3", "--comment=a b", "-x", "n[1-3]"]


def test_slurm_job_sets_up_the_shell_of_srun(env, tmp_path):
    """SETUP changes the environment that srun gets (a module, conda); if it fails, nothing is started or requeued."""
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "bin" / "srun", tmp_path / "other" / "srun")
    done = launch(env, "slurm_job.sh", SETUP='test -z "$NO_SUCH"; PATH=$HOME/../other:$PATH RECORD=$RECORD.2')
    assert done.returncode == 0 and recorded(env) == []
    assert recorded(env | {"RECORD": env["RECORD"] + ".2"})[0].startswith("srun ")
    done = launch(env, "slurm_job.sh", SETUP="no-such-module 2>/dev/null")
    assert done.returncode == 2 and recorded(env) == []
    assert done.stderr == "slurm_job.sh: SETUP ended with status 127: no-such-module 2>/dev/null\n"


def test_slurm_job_starts_containers(env):
    """Each sees the folder of submission, where relative paths of the arguments lie, and MOUNTS."""
    here, settings = str(ROOT), {"MOUNTS": "/data,/a:/b", "SRUN_ARGS": "--mpi=none"}
    launch(env, "slurm_job.sh", *ARGS, PYXIS="image.sqsh", **settings)
    assert shlex.split(recorded(env)[0])[1:] == [
        *("--kill-on-bad-exit=0", "--wait=300", "--mpi=none", "--container-image=image.sqsh"),
        *(f"--container-mounts={here}:{here},/data:/data,/a:/b", f"--container-workdir={here}"),
        *("python", "-m", "crate_jax.main", *ARGS),
    ]
    launch(env, "slurm_job.sh", *ARGS, APPTAINER="image.sif", GPUS=8, **settings)
    assert shlex.split(recorded(env)[0])[3:] == [
        *("--mpi=none", "apptainer", "exec", "--bind", f"{here}:{here},/data:/data,/a:/b", "--pwd", here, "--nv"),
        *("image.sif", "python", "-m", "crate_jax.main", *ARGS),
    ]


@pytest.mark.parametrize(
    "status, settings, requeued",
    [
        (143, {}, True),
        (130, {}, True),
        (75, {}, True),
        (138, {}, True),
        (143, {"SLURM_RESTART_COUNT": 3, "RESTARTS": 4}, True),
        (143, {"SLURM_RESTART_COUNT": 4, "RESTARTS": 4}, False),
        (143, {"STATE": "COMPLETING"}, False),  # scancel
        (0, {}, False),
        (2, {}, False),
        (1, {}, False),
        (137, {}, False),
    ],
)
def test_slurm_job_requeues_what_a_signal_or_a_lost_process_stopped(env, status, settings, requeued):
    done = launch(env, "slurm_job.sh", *ARGS, SRUN_STATUS=status, SLURM_JOB_ID=77, PYTHON="py", **settings)
    asked = recorded(env)
    assert done.returncode == status
    assert shlex.split(asked[0])[:6] == [*("srun", "--kill-on-bad-exit=0", "--wait=300", "py", "-m", "crate_jax.main")]
    assert ("scontrol requeue 77" in asked) is requeued


# Meets the other processes and says so; the first start of the job then waits for a signal.
MEETS = f"""#!{sys.executable}
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
sys.path.insert(0, {str(ROOT)!r})
from crate_jax.parallel import distributed
cluster = distributed.find(os.environ)
distributed.start(cluster)
distributed.barrier("all are there")
os.write(1, f"met {{distributed.process()}} of {{distributed.processes()}} {{sys.argv[1:]}}\\n".encode())
if "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    signal.pause()
distributed.unwatch()
"""

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture
def slurm(tmp_path):
    """A real SLURM of one node, this machine; its environment."""
    daemons = [["munged", "--force"], ["slurmctld", "-i", "-D"], ["slurmd", "-D"]]
    if os.getuid() or not all(shutil.which(daemon[0]) for daemon in daemons):
        pytest.skip("needs root, and Debian's packages slurm-wlm and munge")
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    (tmp_path / "key").write_bytes(os.urandom(1024))
    (tmp_path / "key").chmod(0o600)
    ports, host = [free_port(), free_port()], socket.gethostname().partition(".")[0]
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(folder=tmp_path, ports=ports, host=host))
    files = {"socket": "munge.sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemons[0] += ["--foreground", *(f"--{flag}={tmp_path}/{name}" for flag, name in files.items())]
    env = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            log = stack.enter_context(open(tmp_path / f"{daemon[0]}.out", "w"))
            process = subprocess.Popen(daemon, env=env, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(1)
        yield env


def waited_for(said, path, seconds=120):
    """The text of a file that is written meanwhile, when it has `said`."""
    deadline = time.monotonic() + seconds
    while said not in (text := path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return text


@pytest.mark.slow
def test_a_real_slurm_runs_two_tasks_and_requeues_them_after_a_signal(slurm, tmp_path):
    (tmp_path / "meets").write_text(MEETS)
    (tmp_path / "meets").chmod(0o755)
    settings = {"NODES": "1", "GPUS": "0", "PYTHON": f"{tmp_path}/meets", "SBATCH_ARGS": "--ntasks-per-node=2"}
    settings |= {"SETUP": "export JAX_PLATFORMS=cpu", "SRUN_ARGS": "--label"}
    submitted = subprocess.run(
        [LAUNCH / "slurm.sh", *ARGS], cwd=tmp_path, env=slurm | settings, capture_output=True, text=True, check=True
    )
    job = submitted.stdout.split()[-1]
    log = tmp_path / f"crate-jax-{job}.log"
    started = [f"{i}: met {i} of 2 {['-m', 'crate_jax.main', *ARGS]}" for i in range(2)]
    for line in started:
        waited_for(line, log)
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    deadline = time.monotonic() + 200  # SLURM lets a requeued job wait
    while any(log.read_text().count(line) < 2 for line in started):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpiexec.hydra"])
def test_real_mpiruns_start_processes_that_find_each_other(mpirun, tmp_path):
    if shutil.which(mpirun) is None:
        pytest.skip("needs Debian's package " + {"mpirun.openmpi": "openmpi-bin", "mpiexec.hydra": "mpich"}[mpirun])
    (tmp_path / "meets").write_text(MEETS)
    (tmp_path / "meets").chmod(0o755)
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [mpirun, "-n", "2", tmp_path / "meets", "x"],
        env=os.environ | as_root,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done
    assert {f"met {i} of 2 ['x']" for i in range(2)} <= set(done.stdout.splitlines())


ON = "gcloud compute tpus queued-resources"


@pytest.mark.parametrize(
    "states, status, asked, said",
    [
        (["ACTIVE v5litepod-16", "ACTIVE v5litepod-16"], 0, ["list", "list"], "is ACTIVE"),
        (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0, ["list", "list", "list"], "is PROVISIONING"),
        (["", "PROVISIONING", "ACTIVE"], 0, ["list", "create", "list", "list"], "is ACTIVE"),
        (["SUSPENDED v5litepod-16", "ACTIVE"], 0, ["list", "delete", "create", "list"], "is ACTIVE"),
        (["ACTIVE v6e-16"], 2, ["list"], "NAME=crate-jax is a v6e-16, not the v5litepod-16"),
        (["", "PROVISIONING", "FAILED"], 1, ["list", "create", "list", "list"], "is FAILED"),
        (["PROVISIONING"] * 9, 1, None, "is still PROVISIONING after WAIT=2 seconds"),
    ],
    ids=["reuse", "wait", "new", "pre-empted", "another", "failed", "bounded"],
)
def test_tpu_create_makes_or_takes_and_waits(env, states, status, asked, said):
    (Path(env["HOME"]) / "states").write_text("\n".join(states).replace(" ", "\t") + "\n")
    done = launch(env, "tpu.sh", "create", **TPU, WAIT=2, POLL=1)
    lines = recorded(env)
    assert done.returncode == status and said in done.stdout + done.stderr, done
    assert asked is None or [line.removeprefix(ON).split()[0] for line in lines] == asked
    assert all("--project=p --zone=z" in line for line in lines)


def test_tpu_create_names_machines_image_and_slices(env):
    asked = [
        launch(env, "tpu.sh", "create", "--dry-run", **TPU | more).stdout.splitlines()[1]
        for more in ({}, {"SLICES": 2})
    ]
    assert asked[0] == (
        f"{ON} create crate-jax --node-id=crate-jax --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --project=p --zone=z"
    )
    assert "--node-count=2 --node-prefix=crate-jax" in asked[1] and "--node-id" not in asked[1]


def test_tpu_of_an_own_network(env):
    place = {"NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a@b", "LABELS": "team=vision", "INTERNAL_IPS": 1}
    more = {"RESERVED": 1, "ACCELERATOR": "tpu7x-128", "CREATE_ARGS": "--tags=x,y"}
    asked = launch(env, "tpu.sh", "create", "--dry-run", **TPU | place | more).stdout.splitlines()[1]
    wanted = {"--network=n", "--subnetwork=s", "--service-account=a@b", "--labels=team=vision", "--internal-ips"}
    assert wanted | {"--reserved", "--tags=x,y", "--runtime-version=v2-alpha-tpu7-ubuntu2404"} <= set(
        shlex.split(asked)
    )
    asked = launch(env, "tpu.sh", "create", "--dry-run", **TPU, FLEX_START="4h").stdout.splitlines()[1]
    assert asked.startswith("gcloud alpha ") and "--provisioning-model=flex-start --max-run-duration=4h" in asked
    reach = [
        launch(env, "tpu.sh", "stop", "--dry-run", **TPU | place, IAP=iap).stdout.removeprefix("gcloud ")
        for iap in (1, 0)
    ]
    assert reach[0].startswith("alpha compute") and " --tunnel-through-iap " in reach[0]
    assert reach[1].startswith("compute") and " --internal-ip " in reach[1]


def test_tpu_up_runs_on_the_workers(env, tmp_path):
    """From an empty worker to a run that is followed, refused a second time, and stopped; ssh is a local shell."""
    checkout, home = tmp_path / "checkout", Path(env["HOME"])
    shutil.copytree(LAUNCH, checkout / "launch")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@f"]
    (checkout / "tracked").write_text("committed")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=all"], check=True)
    (checkout / "tracked").write_text("changed since")
    (home / "crate_jax").mkdir()
    (home / "crate_jax" / "gone").write_text("of an older checkout")
    (home / "crate_jax_env" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "program", home / "crate_jax_env" / "bin" / "python")
    (home / "states").write_text("ACTIVE\n" * 4)

    def tpu(*args, **settings):
        return launch(env, "tpu.sh", *args, folder=checkout / "launch", **TPU, **settings)

    shown = tpu("up", "--dry-run", *ARGS, "end")
    assert recorded(env) == []
    done = tpu("up", *ARGS, "end", SETUP='echo "$PWD" >mounted')
    asked = recorded(env)
    assert done.returncode == 0, done
    assert (home / "crate_jax" / "tracked").read_text() == "changed since" and not (
        home / "crate_jax" / "gone"
    ).exists()
    assert (home / "mounted").read_text().strip() == str(home)
    assert done.stdout.splitlines()[-2].split("\t")[5:] == ["-u", "-m", "crate_jax.main", *ARGS, "end"]
    assert done.stdout.splitlines()[-1] == "ended with status 0"
    run = next(line for line in shown.stdout.splitlines() if "tpu_worker.sh run" in line)
    assert shlex.split(run) in words(asked) and "--worker=all" in run and "--worker=0" in asked[-1]
    # What is printed can be pasted: the worker's shell gets the arguments as they were given.
    assert shlex.split(shlex.split(run)[-1].removeprefix("--command="))[2:] == [*ARGS, "end"]
    assert "\\\\" not in shown.stdout
    assert any(line.startswith("python3 -m uv pip install") and line.endswith("crate_jax\\[tpu\\]") for line in asked)

    assert tpu("run", "--workdir=/x").returncode == 0
    again = tpu("run", "--workdir=/x")
    assert again.stderr == "tpu_worker.sh: a run is in progress here; stop it first\n"
    assert tpu("stop").returncode == 0
    assert tpu("logs").stdout.endswith("ended with status 143\n")
    assert tpu("stop").stdout == "no run is in progress here\n"


RELATIVE = {
    "word": ["--workdir=runs/mine"],
    "two-words": ["--workdir", "runs/mine"],
    "one-dash": ["-workdir=runs/mine"],
    "one-dash-two-words": ["-workdir", "runs/mine"],
    "the-last": ["--workdir=/mnt/a", "--workdir", "runs/mine", "--config.steps=3"],
    "dots": ["--workdir=../mine"],
    "home": ["--workdir=~/mine"],
    "empty": ["--workdir="],
    "no-bucket": ["--workdir=gs:/mine"],
}


@pytest.mark.parametrize("args", RELATIVE.values(), ids=RELATIVE)
def test_a_relative_workdir_is_refused_where_it_would_be_lost(env, args):
    """On a slice it would lie in the checkout, which the next sync deletes; in a pod, in its own file system."""
    (given,) = [x.rpartition("=")[2] for x in args if "mine" in x] or [""]
    for script, commands, settings in [
        ("tpu.sh", ("up", "run"), TPU),
        ("kubernetes.sh", ("run",), KUBERNETES | {"HOSTS": 2}),
    ]:
        for command in commands:
            done = launch(env, script, command, "--config=quickstart", *args, **settings)
            assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
            assert done.stderr.startswith(f"{script}: --workdir={given}: must be an absolute path, gs://BUCKET/PATH")
            assert recorded(env) == []
    # The same flag with a workdir that lasts; the folder of submission is shared by the nodes of a cluster.
    for workdir in ("/mnt/a", "gs://b/a", "s3://b/a"):
        lasting = [x.replace(given, workdir) if given else x + workdir for x in args]
        for script, command, settings in [("tpu.sh", "run", TPU), ("kubernetes.sh", "run", KUBERNETES | {"HOSTS": 2})]:
            done = launch(env, script, command, "--dry-run", *lasting, **settings)
            assert done.returncode == 0 and workdir in done.stdout, done
    assert launch(env, "slurm.sh", "--dry-run", *args, **SLURM).returncode == 0


@pytest.mark.parametrize(
    "args, settings, warned",
    [
        (["--workdir=gs://b/runs/a"], {}, True),
        (["--workdir", "s3://b/runs/a"], {}, True),
        (["--workdir=/mnt/a", "--workdir=gs://b/runs/a"], {}, True),
        (["--workdir=gs://b/runs/a", "--workdir=/mnt/a"], {}, False),
        (["--workdir=gs://b/runs/a"], {"CRATE_JAX_SCRATCH": "/mnt/the copies"}, False),
        (["--workdir=gs://b/runs/a"], {"ACCELERATOR": "v5litepod-8"}, False),
        (["--workdir=gs://b/runs/a"], {"ACCELERATOR": "v5litepod-8", "SLICES": 2}, True),
        (["--config.checkpoint=gs://b/runs/a", "--workdir=/mnt/a"], {}, False),
    ],
)
def test_tpu_warns_of_a_bucket_without_a_shared_folder(env, args, settings, warned):
    """On stderr, so that a dry run can still be pasted; the workers get the folder, whatever its name."""
    shown = launch(env, "tpu.sh", "run", "--dry-run", *args, **TPU | settings)
    lines = shown.stderr.splitlines()
    assert shown.returncode == 0 and len(lines) == warned and all("CRATE_JAX_SCRATCH" in line for line in lines)
    given = shlex.split(shlex.split(shown.stdout.splitlines()[0])[-1].removeprefix("--command="))
    scratch = settings.get("CRATE_JAX_SCRATCH")
    passed = ["env", f"CRATE_JAX_SCRATCH={scratch}"] if scratch else []
    assert given == [*passed, "crate_jax/launch/tpu_worker.sh", "run", *args]


def manifest(env, *args, **settings):
    """The JobSet that kubernetes.sh hands to kubectl, after a look at its dry run, and its container."""
    shown = launch(env, "kubernetes.sh", "run", "--dry-run", *args, **settings)
    assert shown.returncode == 0 and recorded(env) == [], shown
    assert launch(env, "kubernetes.sh", "run", *args, **settings).returncode == 0
    text = (Path(env["HOME"]) / "manifest").read_text()
    (asked,) = recorded(env)
    assert shown.stdout == f"{asked} <<'EOF'\n{text.rstrip()}\nEOF\n" and "${" not in text
    jobset = yaml.safe_load(text)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return jobset, job, job["template"]["spec"]


def expanded(text, variables):
    """What Kubernetes makes of a word of a container's command, or of a value of its environment."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda x: "$" if x[0] == "$$" else variables.get(x[1], x[0]), text)


def test_kubernetes_does_not_expand_what_the_user_gave(env):
    """`$$` would become `$`, and `$(NAME)` the value of a variable; the number of the pod is the script's own."""
    given = ["$$", "$$$", "a$$(HOSTNAME)", "$(HOSTNAME)$", "--workdir=/shared/$$/$(JOB_COMPLETION_INDEX)", "$HOME"]
    settings = KUBERNETES | {"HOSTS": 2, "GPUS": 1, "NCCL_DEBUG_FILE": "/shared/$$.$(PYTHONUNBUFFERED).%h"}
    settings |= {"CRATE_JAX_TOKEN": "pa$$word", "PYTHON": "/opt/$$/python"}
    (container,) = manifest(env, *given, **settings)[2]["containers"]
    variables = {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "host", "PYTHONUNBUFFERED": "1"}
    command = [expanded(word, variables) for word in container["command"]]
    assert command[:3] == ["/opt/$$/python", "-m", "crate_jax.main"] and command[3:-3] == given
    assert command[-1] == "--process_id=1"
    values = {x["name"]: expanded(x["value"], variables) for x in container["env"]}
    assert values["NCCL_DEBUG_FILE"] == settings["NCCL_DEBUG_FILE"] and values["CRATE_JAX_TOKEN"] == "pa$$word"


def test_kubernetes_gpus(env):
    settings = KUBERNETES | {"HOSTS": 3, "GPUS": 8, "NAME": "null", "NCCL_IB_HCA": '=mlx5_"$(A)', "NCCL_DEBUG": ""}
    jobset, job, pod = manifest(env, *ARGS, '"\\\t\n', "$(HOSTNAME)", **settings)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {"name": "null", "annotations": {}}
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    (container,) = pod["containers"]
    assert container["command"] == [
        *("python", "-m", "crate_jax.main", *ARGS[:-1], ARGS[-1].replace("$", "$$"), '"\\\t\n', "$$(HOSTNAME)"),
        *("--coordinator_address=null-host-0-0.null:8476", "--num_processes=3"),
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert jobset["spec"]["replicatedJobs"][0]["name"] == "host"  # of the coordinator's name
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"} and pod["nodeSelector"] == {}
    variables = {"PYTHONUNBUFFERED": "1", "CRATE_JAX_TOKEN": 'known"', "NCCL_DEBUG": "WARN"}
    variables["NCCL_IB_HCA"] = '=mlx5_"$$(A)'
    assert {v["name"]: v["value"] for v in container["env"]} == variables
    assert container["image"] == KUBERNETES["IMAGE"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == KUBERNETES["CLAIM"]


def test_kubernetes_makes_a_token_for_each_run(env):
    settings = KUBERNETES | {"HOSTS": 2, "CRATE_JAX_TOKEN": ""}
    shown = [launch(env, "kubernetes.sh", "run", "--dry-run", *ARGS, **settings).stdout for _ in range(2)]
    tokens = [re.search(r'"CRATE_JAX_TOKEN", "?value"?: "(\w{32})"', text)[1] for text in shown]
    assert tokens[0] != tokens[1]


def test_kubernetes_restarts_all_but_the_users_mistake(env):
    jobset, job, pod = manifest(env, **KUBERNETES, HOSTS=1, RESTARTS=7)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "FailJobSet"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # podFailurePolicy works with nothing else
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]}


@pytest.mark.parametrize(
    "settings, hosts, chips",
    [({}, 4, "4"), ({"TOPOLOGY": "2x2x2"}, 2, "4"), ({"TOPOLOGY": "1x1"}, 1, "1"), ({"CHIPS": 8}, 2, "8")],
)
def test_kubernetes_tpus(env, settings, hosts, chips):
    jobset, job, pod = manifest(env, *ARGS, **GKE | settings | {"SPOT": 1, "SLICES": 2})
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2 and job["parallelism"] == job["completions"] == hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": (GKE | settings)["TOPOLOGY"],
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"][-1] == ARGS[-1].replace("$", "$$")  # JAX reads GKE's variables
    assert container["env"] == [{"name": "PYTHONUNBUFFERED", "value": "1"}]


def test_kubernetes_runs_as_the_owner_of_the_volume(env):
    pods = [manifest(env, **KUBERNETES, HOSTS=1, RUN_AS=user)[2] for user in ("", 4321)]
    assert [pod["securityContext"] for pod in pods] == [{}, {"runAsUser": 4321}]


def test_the_image_has_the_locked_versions_no_root_and_no_secret():
    """`make lint` runs hadolint besides."""
    text = (LAUNCH / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in re.sub(r"\\\n", "", text).splitlines() if line and line[0] != "#"]
    assert [
        re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", rest) is not None for step, rest in steps if step == "FROM"
    ] == [True]
    installs = [part for step, rest in steps if step == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert installs and all("requirements.lock" in part or "--no-deps" in part for part in installs)
    assert [rest for step, rest in steps if step == "USER"] == ["1000"]
    assert not re.search(r"(?i)token|password|secret|credential", text)
    # Only what is named is sent to the builder, and all that is copied is named.
    sent = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]}
    assert copied - {"crate_jax/__init__.py"} == sent and all((ROOT / name).exists() for name in sent)


@pytest.mark.parametrize("extras, wanted", [("cuda,tensorboard", ".[cuda,tensorboard]"), ("", ".")])
def test_the_image_can_have_extras_or_none(env, tmp_path, extras, wanted):
    """Without any no brackets, since pip refuses `.[]`. The shell of the image is sh."""
    text = (LAUNCH / "Dockerfile").read_text()
    (step,) = re.findall(r"^RUN ((?:.*\\\n)*.*--constraint.*)", text, re.MULTILINE)
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "bin" / "pip")
    subprocess.run(["sh", "-c", step], env=env | {"EXTRAS": extras}, check=True)
    packages, ours = words(recorded(env))
    assert packages == ["pip", "install", "--no-cache-dir", "--requirement", "requirements.lock"]
    assert ours == ["pip", "install", "--no-cache-dir", "--constraint", "requirements.lock", wanted]


def is_alive(group):
    """Whether a process of the group runs; one that has ended and that nobody asked for (a zombie) does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


class Local:
    """local.sh under way: its processes' first lines, and what became of them."""

    def __init__(self, env, tmp_path, *args, n=2, **settings):
        environment = env | {"N": str(n), "PYTHON": f"{tmp_path}/program"} | {k: str(v) for k, v in settings.items()}
        self.process = subprocess.Popen(
            [str(LAUNCH / "local.sh"), *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.read(n)

    def read(self, n):
        """The first lines of `n` processes."""
        lines = sorted(self.process.stdout.readline().rstrip("\n").split("\t") for _ in range(n))
        self.pids = [int(line[1]) for line in lines]
        self.shown = [line[2:] for line in lines]

    def wait(self):
        """The launcher's status, when it and all its processes and their children are gone."""
        rest, self.errors = self.process.communicate(timeout=20)  # ends when nobody holds the pipe any more
        self.rest = rest.splitlines()
        deadline = time.monotonic() + 5  # a process lets go of the pipe shortly before it is gone
        while alive := [pid for pid in self.pids if is_alive(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.01)
        return self.process.returncode


def test_local_gives_each_process_its_number_and_devices(env, tmp_path):
    local = Local(env, tmp_path, *ARGS, "end", n=3, JAX_NUM_CPU_DEVICES=2, PORT=18123)
    assert local.wait() == 0 and local.errors == ""
    for number, shown in enumerate(local.shown):
        assert shown[:3] == ["cpu", "2", "-"] and shown[3:] == [
            *("-m", "crate_jax.main", *ARGS, "end", "--coordinator_address=127.0.0.1:18123"),
            *("--num_processes=3", f"--process_id={number}"),
        ]
    settings = {"N": 2, "CUDA_VISIBLE_DEVICES": "4,5,7,6"}
    lines = launch(env, "local.sh", "--dry-run", *ARGS, **settings).stdout.splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["env", f"CUDA_VISIBLE_DEVICES={x}"] for x in ("4,5", "7,6")]
    assert all("JAX_PLATFORMS" not in line and " NCCL_DEBUG=WARN " in line for line in lines)
    assert " NCCL_DEBUG=INFO " in launch(env, "local.sh", "--dry-run", **settings, NCCL_DEBUG="INFO").stdout


def test_local_ends_with_the_first_failure_and_leaves_nobody(env, tmp_path):
    start = time.monotonic()
    local = Local(env, tmp_path, "child", "fail1=7", n=3, GRACE=1)
    assert local.wait() == 7
    assert 1 < time.monotonic() - start < 10  # the others had their time, and no more
    # Those that stop by themselves are waited for, with the first status kept.
    assert Local(env, tmp_path, "fail0=143", "fail1=7", n=2).wait() == 143


def test_local_starts_again_what_lost_a_process_but_no_other_failure(env, tmp_path):
    """Up to RESTARTS times, with the same command; a mistake of the user would only come again."""
    for status, restarts, said in [
        (75, 2, [f"local.sh: process 1 ended with status 75; restart {i} of 2, with 2 processes" for i in (1, 2)]),
        (2, 2, []),
        (75, 0, []),
    ]:
        local = Local(env, tmp_path, "end", f"fail1={status}", RESTARTS=restarts)
        assert local.wait() == status and local.errors.splitlines() == said
        again = sorted(line.split("\t")[2:] for line in local.rest)
        assert again == sorted(local.shown * len(said))


def test_local_leaves_a_killed_process_out_with_its_gpu(env, tmp_path):
    """As long as MIN stay; after a signal to the launcher it starts nothing again."""
    local = Local(env, tmp_path, n=3, MIN=2, RESTARTS=5, GRACE=1, CUDA_VISIBLE_DEVICES="4,5,6")
    for n, victim, gpus in [(2, local.pids[1], ["4", "6"]), (2, None, ["4", "6"])]:
        os.kill(victim or local.pids[0], signal.SIGKILL)
        local.read(n)
        assert [shown[2] for shown in local.shown] == gpus
        assert [shown[-2:] for shown in local.shown] == [["--num_processes=2", f"--process_id={i}"] for i in range(2)]
    local.process.send_signal(signal.SIGTERM)
    assert local.wait() == 143
    assert [line.rpartition("; ")[2] for line in local.errors.splitlines() if "; restart" in line] == [
        "restart 1 of 5, with 2 processes",
        "restart 2 of 5, with 2 processes",
    ]


def test_local_leaves_a_hung_process_out_that_it_had_to_kill(env, tmp_path):
    """The one that ended by itself, since the other was silent, is started again."""
    local = Local(env, tmp_path, "fail1=75", n=2, MIN=1, RESTARTS=1, GRACE=1, CUDA_VISIBLE_DEVICES="4,5")
    hung = local.pids[0]
    local.read(1)
    assert [shown[2] for shown in local.shown] == ["5"] and not is_alive(hung)
    local.process.send_signal(signal.SIGTERM)
    assert local.wait() == 143
    assert local.errors.splitlines() == [
        "local.sh: process 0 has not ended within GRACE=1 seconds: killed",
        "local.sh: process 1 ended with status 75; restart 1 of 1, with 1 processes",
    ]


@pytest.mark.parametrize("status", [143, 137], ids=["saved", "killed"])
def test_local_asked_to_stop_ends_what_hangs_and_starts_nothing_again(env, tmp_path, status):
    """Process 1 hangs; process 0 saves, or hangs too until it is killed, which would be restarted otherwise."""
    local = Local(env, tmp_path, MIN=1, RESTARTS=1, GRACE=1)
    for pid in local.pids[status == 143 :]:
        os.kill(pid, signal.SIGSTOP)
    local.process.send_signal(signal.SIGTERM)
    if status == 137:
        time.sleep(0.5)  # bash can lose the status of a process that ends at the moment of a signal
        os.kill(local.pids[0], signal.SIGKILL)
    assert local.wait() == status and local.rest == []
    said = [line for line in local.errors.splitlines() if line.startswith("local.sh")]  # bash too names who was killed
    assert said == ["local.sh: process 1 has not ended within GRACE=1 seconds: killed"]


@pytest.mark.parametrize(
    "sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143), (signal.SIGUSR2, 140)]
)
def test_local_passes_signals_on_once(env, tmp_path, sent, status):
    local = Local(env, tmp_path)
    local.process.send_signal(sent)
    assert local.wait() == status


def test_local_killed_takes_its_processes_along(env, tmp_path):
    """They share a token, which nobody else knows."""
    local = Local(env, tmp_path)
    named = re.compile(rb"CRATE_JAX_TOKEN=[0-9a-f]{32}\0")
    tokens = [named.search(Path(f"/proc/{pid}/environ").read_bytes())[0] for pid in local.pids]
    assert tokens[0] == tokens[1]
    local.process.kill()
    assert local.wait() == -signal.SIGKILL
