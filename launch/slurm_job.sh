#!/usr/bin/env bash
# The batch script that slurm.sh submits: runs srun, then requeues the job if a signal stopped the run and its state is
# saved, or if a process is gone.
#
#   launch/slurm_job.sh [--dry-run] ARGUMENTS of crate_jax.main
#
#   PYTHON     interpreter (python)
#   RESTARTS   how often the job may be requeued (100)
#   CRATE_JAX_TOKEN   text that a process must know to join the run (random)
#   SETUP, SRUN_ARGS, PYXIS, APPTAINER, MOUNTS, GPUS   as in slurm.sh
#
# The processes find each other by SLURM's variables. The script ends with srun's status, the highest of all processes.

# This file sources no other, since SLURM runs a copy of it in another folder.
set -uo pipefail

dry_run=
case ${1:-} in
  --help | -h)
    sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
  --dry-run) dry_run=yes && shift ;;
esac

# SETUP before all else, since it may change the PATH; conda's and modules' own scripts read variables that are not set.
if [[ -n ${SETUP:-} && -n $dry_run ]]; then
  printf '%s\n' "$SETUP"
elif [[ -n ${SETUP:-} ]]; then
  set +u
  eval "$SETUP"
  status=$?
  set -u
  if ((status)); then
    echo "slurm_job.sh: SETUP ended with status $status: $SETUP" >&2
    exit 2
  fi
fi

mounts=$PWD:$PWD
IFS=, read -r -a folders <<<"${MOUNTS:-}"
for folder in ${folders[@]+"${folders[@]}"}; do
  [[ $folder == *:* ]] || folder=$folder:$folder
  mounts+=,$folder
done
set -f
eval "options=(${SRUN_ARGS:-})"
set +f
container=()
if [[ -n ${PYXIS:-} ]]; then
  options+=(--container-image="$PYXIS" --container-mounts="$mounts" --container-workdir="$PWD")
elif [[ -n ${APPTAINER:-} ]]; then
  container=(apptainer exec --bind "$mounts" --pwd "$PWD")
  [[ ${GPUS:-0} == 0 ]] || container+=(--nv)
  container+=("$APPTAINER")
fi

command=(
  # A process that fails does not end the others at once: they may be saving, and they notice by themselves that a
  # process is gone, name it and stop. After five minutes SLURM ends the rest.
  srun --kill-on-bad-exit=0 --wait=300
  # Since SLURM 22.05 a step no longer inherits this from its job.
  ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
  ${options[@]+"${options[@]}"} ${container[@]+"${container[@]}"}
  "${PYTHON:-python}" -m crate_jax.main "$@"
)
if [[ -n $dry_run ]]; then
  printf -v line '%q ' "${command[@]}"
  printf '%s\n' "${line% }"
  exit 0
fi

export CRATE_JAX_TOKEN=${CRATE_JAX_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')} # srun passes it on
"${command[@]}"
status=$?
# 143, 130, 138 and 140: a signal stopped the run (before the time limit or pre-emption; USR1 and USR2 are warnings that
# --signal asks for), and its state is saved. 75: a process is gone or silent, without a status. After the loss of a node
# SLURM itself requeues the job. Any other failure would only repeat itself.
if [[ $status =~ ^(143|130|138|140|75)$ ]]; then
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
    # scancel sends the same signal, but a cancelled job must not come back.
    CANCELLED | COMPLETING) ;;
    *)
      if ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-100})); then
        scontrol requeue "$SLURM_JOB_ID"
      else
        echo "slurm_job.sh: not requeued: RESTARTS=${RESTARTS:-100} are used up" >&2
      fi
      ;;
  esac
fi
exit "$status"
