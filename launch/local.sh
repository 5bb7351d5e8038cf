#!/usr/bin/env bash
# N processes of one run on this machine.
#
#   N=2 JAX_NUM_CPU_DEVICES=2 launch/local.sh --config=... --workdir=...
#   N=2 CUDA_VISIBLE_DEVICES=0,1,2,3 launch/local.sh --config=... --workdir=...
#
# All arguments go to `python -m crate_jax.main`; --dry-run prints the commands, one a line.
#
#   N                     number of processes (needed)
#   CUDA_VISIBLE_DEVICES  GPUs, cut into N equal parts in this order; without it the run is on the CPU
#   JAX_NUM_CPU_DEVICES   virtual devices of each process on the CPU (cores / N)
#   PYTHON                interpreter (python)
#   PORT                  where the processes meet (one made from the launcher's process id)
#   GRACE                 seconds the others get to stop by themselves when one failed, before SIGKILL (120)
#
# INT, TERM, USR1, USR2 and QUIT go on to every process, HUP as TERM. Ends when all have ended, with the first status
# that was not 0. When the launcher is killed -9, its processes get SIGTERM (Linux).

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
    COMMAND=(env "CUDA_VISIBLE_DEVICES=${gpus[*]:$1*share:share}")
  else
    COMMAND=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "JAX_NUM_CPU_DEVICES=$JAX_NUM_CPU_DEVICES")
  fi
  # The kernel's own notice of the launcher's death: nothing else can see a kill -9.
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
# Another run's coordinator would take our processes for its own.
if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then fail "PORT=$PORT is taken; name another"; fi

# Each process gets a group of its own: Ctrl-C then reaches the launcher alone, which passes it on once (the second one
# ends a run without saving), SIGINT is not ignored as in other background commands, and what a process leaves behind
# can be ended with its group.
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
# Kept until all have started, so that none misses it.
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
  # A look five times a second, and at once after a signal. Not `wait -n`: of two that end together it can miss one.
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
      # Not TERM at once: the others may be saving for the same signal, and a second one would end that; a run whose
      # peer died says so itself, and stops.
      deadline=$((SECONDS + GRACE))
    fi
  done
done
exit "$first"
