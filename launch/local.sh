#!/usr/bin/env bash
# Starts one run as N processes on this machine.
#
#   N=2 JAX_NUM_CPU_DEVICES=2 launch/local.sh --config=... --workdir=...
#   N=2 CUDA_VISIBLE_DEVICES=0,1,2,3 launch/local.sh --config=... --workdir=...
#
# All arguments go to `python -m crate_jax.main`; --dry-run prints the commands, one per line.
#
#   N                     number of processes (required)
#   CUDA_VISIBLE_DEVICES  GPUs, which are cut into N equal parts in this order; without it the run uses the CPU
#   JAX_NUM_CPU_DEVICES   number of virtual devices of each process on the CPU (cores / N)
#   NCCL_*                settings of NCCL, which the processes get; NCCL_DEBUG is WARN if it is not set
#   PYTHON                interpreter (python)
#   PORT                  port at which the processes meet (a number made from the launcher's process id)
#   GRACE                 seconds between the failure of one process and SIGKILL for the others (120)
#
# The launcher passes INT, TERM, USR1, USR2 and QUIT on to every process, and HUP as TERM. It ends after all processes,
# with the first status that is not 0. If kill -9 ends the launcher, its processes get SIGTERM (on Linux).

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
PYTHON=${PYTHON:-python} GRACE=${GRACE:-120} PORT=${PORT:-$((20000 + $$ % 10000))}
need N "the number of processes, as in N=2"
need_count N
need_count GRACE
need_count PORT
((PORT < 65536)) || fail "PORT=$PORT: must be at most 65535"

gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  ((${#gpus[@]} % N == 0)) ||
    fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: ${#gpus[@]} GPUs cannot be cut into N=$N equal parts"
else
  cores=$(nproc 2>/dev/null || echo 1)
  JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-$((cores > N ? cores / N : 1))}
  need_count JAX_NUM_CPU_DEVICES
fi

# Sets COMMAND to the command of process $1.
set_command() {
  local share=$((${#gpus[@]} / N)) IFS=,
  if ((share)); then
    COMMAND=(env "CUDA_VISIBLE_DEVICES=${gpus[*]:$1*share:share}" "NCCL_DEBUG=${NCCL_DEBUG:-WARN}")
  else
    COMMAND=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "JAX_NUM_CPU_DEVICES=$JAX_NUM_CPU_DEVICES")
  fi
  # The kernel sends TERM when the launcher dies: after kill -9 nothing else can.
  if command -v setpriv >/dev/null; then COMMAND+=(setpriv --pdeathsig TERM); fi
  COMMAND+=("$PYTHON" -m crate_jax.main "${ARGS[@]}"
    "--coordinator_address=127.0.0.1:$PORT" "--num_processes=$N" "--process_id=$1")
}

if [[ -n $DRY_RUN ]]; then
  for ((i = 0; i < N; i++)); do
    set_command "$i"
    show "${COMMAND[@]}"
  done
  exit 0
fi

command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such command"
# Our processes would join another run whose coordinator uses this port.
if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then fail "PORT=$PORT is in use; choose another"; fi

# Each process gets its own group, for three reasons. Ctrl-C then reaches the launcher alone, which passes it on once
# (a second one would end a run without saving). The process does not ignore SIGINT, as other background commands do.
# And the launcher can end with the group what a process leaves behind.
set -m
declare -A running=()
received=()

pass_on() {
  local pid
  for pid in "${!running[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

end_groups() {
  local pid
  for pid in "$@"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
}

trap 'end_groups "${!running[@]}"' EXIT
signals=(INT TERM QUIT USR1 USR2)
# A signal is kept until all processes have started, so that none misses it.
for signal in "${signals[@]}"; do
  # shellcheck disable=SC2064
  trap "received+=($signal)" "$signal"
done
trap 'received+=(TERM)' HUP
for ((i = 0; i < N; i++)); do
  set_command "$i"
  "${COMMAND[@]}" </dev/null &
  running[$!]=$i
done
for signal in "${signals[@]}"; do
  # shellcheck disable=SC2064
  trap "pass_on $signal" "$signal"
done
trap 'pass_on TERM' HUP
for signal in "${received[@]}"; do pass_on "$signal"; done

first=0 deadline=
while ((${#running[@]})) && [[ -z $deadline || $SECONDS -lt $deadline ]]; do
  # The loop checks five times a second, and at once after a signal. `wait -n` can miss one of two processes that end
  # together.
  sleep 0.2 &
  wait $! || true
  for pid in "${!running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then continue; fi
    status=0
    wait "$pid" || status=$?
    unset "running[$pid]"
    end_groups "$pid"
    if ((status && !first)); then
      first=$status
      # The others get no TERM: they may be saving after the same signal, and a second one would end that. They
      # notice by themselves that a process is gone, name it and stop.
      deadline=$((SECONDS + GRACE))
    fi
  done
done
exit "$first"
