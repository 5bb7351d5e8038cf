#!/usr/bin/env bash
# The batch script that slurm.sh submits: srun, then requeue when the run was stopped by a signal with its state saved,
# or because another process was gone.
#
#   launch/slurm_job.sh [--dry-run] ARGUMENTS of crate_jax.main
#
#   PYTHON     interpreter (python)
#   RESTARTS   how often the job may be requeued (100)
#
# JAX finds its processes from SLURM's own variables. Status: srun's, the highest of all processes.

# Sources nothing: SLURM runs a copy of this file from a folder of its own.
set -uo pipefail

dry_run=
case ${1:-} in
  --help | -h)
    sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
  --dry-run) dry_run=yes && shift ;;
esac

command=(
  # One process that fails does not end the others at once: they may be saving, and a run whose peer died stops by itself
  # and says which it was. After five minutes SLURM ends what is left.
  srun --kill-on-bad-exit=0 --wait=300
  # since SLURM 22.05 a step no longer takes this from its job
  ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
  "${PYTHON:-python}" -m crate_jax.main "$@"
)
if [[ -n $dry_run ]]; then
  printf -v line '%q ' "${command[@]}"
  printf '%s\n' "${line% }"
  exit 0
fi

"${command[@]}"
status=$?
# 143 and 130: a signal (the coming limit, pre-emption), state saved. 75: a process is gone, or silent, with no status of
# its own; of a node that SLURM lost, it requeues the job itself. Everything else would only fail again.
if ((status == 143 || status == 130 || status == 75)); then
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
    # scancel sends the same signal; who cancels a job does not want it back
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
