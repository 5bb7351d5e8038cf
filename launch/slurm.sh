#!/usr/bin/env bash
# Submits one run to SLURM: one process per GPU on every node; it continues after pre-emption and after the time limit.
#
#   NODES=2 GPUS=8 TIME=24:00:00 launch/slurm.sh --config=... --workdir=...
#
# All arguments go to `python -m crate_jax.main`; --dry-run prints the command. The command runs in the
# folder from which you submit it. The workdir must be on a file system that all nodes share.
#
#   NODES      number of nodes (required)
#   GPUS       number of GPUs and of processes on each node; 0: one process on the CPU (required)
#   TIME       time limit of one allocation, in sbatch's formats (the partition's limit)
#   LEAD       seconds before the limit at which SIGTERM asks the run to save (300; SLURM may be a minute early)
#   RESTARTS   how often the job may be requeued (100)
#   NAME       the job's name; the log is NAME-JOBID.log (crate-jax)
#   NCCL_*     settings of NCCL, such as NCCL_SOCKET_IFNAME, which all processes get; NCCL_DEBUG is WARN if it is not set
#   PYTHON     interpreter on the nodes (python)
#   CPUS, MEMORY, PARTITION, ACCOUNT, QOS, CONSTRAINT    passed to sbatch if set; CPUS per process, MEMORY per node
#   GRES       asks for the GPUs of a node in this way, as in gpu:a100:8, where --gpus-per-node is not known
#   EXCLUSIVE  1: no other job on the nodes (0)
#   SBATCH_ARGS, SRUN_ARGS   more options of sbatch and of srun, as in SBATCH_ARGS='--reservation=x --mail-type=END'
#   SETUP      commands for the batch script before srun, as in SETUP='module load cuda; source env/bin/activate'
#   PYXIS      container image that srun's plug-in pyxis starts, as in docker://IMAGE:TAG or FILE.sqsh
#   APPTAINER  container image that apptainer starts, as in FILE.sif; PYTHON is then the one in the image
#   MOUNTS     folders that the container sees besides the one from which you submit, as in /data,/scratch/me:/out

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
NODES=${NODES:-} GPUS=${GPUS:-} NAME=${NAME:-crate-jax} LEAD=${LEAD:-300} EXCLUSIVE=${EXCLUSIVE:-0}
# for slurm_job.sh, which sbatch runs in this environment
export GPUS RESTARTS=${RESTARTS:-100} PYTHON=${PYTHON:-python}
export SETUP=${SETUP:-} SRUN_ARGS=${SRUN_ARGS:-} PYXIS=${PYXIS:-} APPTAINER=${APPTAINER:-} MOUNTS=${MOUNTS:-}
need NODES "the number of nodes, as in NODES=2"
need_count NODES
need GPUS "the number of GPUs of each node, as in GPUS=8; 0 for the CPU"
need_count GPUS 0
need_count LEAD
((LEAD < 65536)) || fail "LEAD=$LEAD: sbatch takes at most 65535 seconds"
need_count RESTARTS 0
need_label NAME
[[ -z ${TIME:-} || $TIME =~ ^[0-9]+(:[0-9]+){0,2}$|^[0-9]+-[0-9]+(:[0-9]+){0,2}$ ]] ||
  fail "TIME=$TIME: must be MINUTES, [HOURS:]MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]"
[[ -z ${CPUS:-} ]] || need_count CPUS
need_switch EXCLUSIVE
need_one PYXIS APPTAINER
[[ -z $MOUNTS || -n $PYXIS$APPTAINER ]] || fail "MOUNTS=$MOUNTS: needs a container, PYXIS or APPTAINER"
[[ -z ${GRES:-} || $GPUS != 0 ]] || fail "GRES=$GRES and GPUS=0: GPUS is the number of processes of each node, one per GPU"
split SRUN_ARGS
split SBATCH_ARGS

options=(
  --job-name="$NAME" --output=%x-%j.log --open-mode=append --requeue
  # Without "B:" SLURM signals the processes and not the batch shell, which must see how they end.
  --signal=TERM@"$LEAD"
  --nodes="$NODES" --ntasks-per-node="$((GPUS ? GPUS : 1))"
)
# --gpus-per-task would be wrong: JAX uses the GPU with the process's local number, so every process must see all GPUs
# of its node.
# ALL is sbatch's default: every NCCL_* of this environment reaches the processes.
((GPUS == 0)) || options+=(--export="ALL,NCCL_DEBUG=${NCCL_DEBUG:-WARN}")
if [[ -n ${GRES:-} ]]; then options+=(--gres="$GRES"); elif ((GPUS)); then options+=(--gpus-per-node="$GPUS"); fi
((EXCLUSIVE == 0)) || options+=(--exclusive)
[[ -z ${TIME:-} ]] || options+=(--time="$TIME")
[[ -z ${CPUS:-} ]] || options+=(--cpus-per-task="$CPUS")
[[ -z ${MEMORY:-} ]] || options+=(--mem="$MEMORY")
[[ -z ${PARTITION:-} ]] || options+=(--partition="$PARTITION")
[[ -z ${ACCOUNT:-} ]] || options+=(--account="$ACCOUNT")
[[ -z ${QOS:-} ]] || options+=(--qos="$QOS")
[[ -z ${CONSTRAINT:-} ]] || options+=(--constraint="$CONSTRAINT")

run sbatch "${options[@]}" "${WORDS[@]}" "$(dirname "${BASH_SOURCE[0]}")/slurm_job.sh" "${ARGS[@]}"
