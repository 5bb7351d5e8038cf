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
#   CRATE_JAX_TOKEN       text that a process must know to join the run (random)
#   PORT                  port at which the processes meet (a number made from the launcher's process id)
#   GRACE                 seconds between the failure of one process and SIGKILL for the others (120)
#   RESTARTS              how often the run is started again after a status of 75 or a process that was killed (0)
#   MIN                   the smallest number of processes: a restart leaves out those that were killed, also by
#                         the launcher after GRACE, with their GPUs, as long as so many stay; the batch must be
#                         divisible by the devices that stay (N)
#
# The launcher passes INT, TERM, USR1, USR2 and QUIT on to every process, and HUP as TERM; after one of these it starts
# nothing again. It ends after all processes, with the first status that is not 0. If kill -9 ends the launcher, its
# processes get SIGTERM (on Linux).

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
PYTHON=${PYTHON:-python} GRACE=${GRACE:-120} PORT=${PORT:-$((20000 + $$ % 10000))} RESTARTS=${RESTARTS:-0}
need N "the number of processes, as in N=2"
need_count N
need_count GRACE
need_count RESTARTS 0
MIN=${MIN:-$N}
need_count MIN
((MIN <= N)) || fail "MIN=$MIN: must be at most N=$N"
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

CRATE_JAX_TOKEN=${CRATE_JAX_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
export CRATE_JAX_TOKEN

# Each process gets its own group, for three reasons. Ctrl-C then reaches the launcher alone, which passes it on once
# (a second one would end a run without saving). The process does not ignore SIGINT, as other background commands do.
# And the launcher can end with the group what a process leaves behind.
set -m
declare -A running=()
received=() starting='' stopped=''

pass_on() {
  local pid
  for pid in "${!running[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

end_groups() {
  local pid
  for pid in "$@"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
}

# A signal is kept until all processes have started, so that none misses it.
# shellcheck disable=SC2329
on_signal() {
  stopped=$1
  if [[ -n $starting ]] || ((!${#running[@]})); then received+=("$1"); else pass_on "$1"; fi
}

trap 'end_groups "${!running[@]}"' EXIT
for signal in INT TERM QUIT USR1 USR2; do
  # shellcheck disable=SC2064
  trap "on_signal $signal" "$signal"
done
trap 'on_signal TERM' HUP

start_all() {
  local i signal
  starting=yes
  for ((i = 0; i < N; i++)); do
    set_command "$i"
    "${COMMAND[@]}" </dev/null &
    running[$!]=$i
  done
  starting=''
  for signal in "${received[@]}"; do pass_on "$signal"; done
}

# is_gone STATUS: whether a process was killed. After the other signals the run has saved; with SIGABRT (134) JAX ends a
# process that has lost another one.
is_gone() { (($1 > 128)) && [[ ! $1 =~ ^(129|130|131|134|138|140|143)$ ]]; }

# Waits until all processes have ended. Sets `first` to the first status that is not 0, `who` to the number of its
# process, `gone` to the numbers of the processes that were killed, each between spaces, and `hung` to those of the
# processes that it had to kill, each with a space after it.
wait_for_all() {
  local pid status deadline=
  first=0 who='' gone=' ' hung=''
  while ((${#running[@]})); do
    if [[ -n $deadline && $SECONDS -ge $deadline ]]; then
      end_groups "${!running[@]}"
      for pid in "${!running[@]}"; do
        status=0
        wait "$pid" 2>/dev/null || status=$? # without bash's message about the job; ours says why
        if ! is_gone "$status"; then continue; fi # it ended by itself at the last moment
        hung+="${running[$pid]} "
        printf '%s: process %s has not ended within GRACE=%s seconds: killed\n' "${0##*/}" "${running[$pid]}" "$GRACE" >&2
      done
      running=()
      break
    fi
    # The loop checks five times a second, and at once after a signal. `wait -n` can miss one of two processes that end
    # together.
    sleep 0.2 &
    wait $! || true
    for pid in "${!running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then continue; fi
      status=0
      wait "$pid" || status=$?
      if is_gone "$status"; then gone+="${running[$pid]} "; fi
      if ((status && !first)); then
        first=$status who=${running[$pid]}
        # The others get no TERM: they may be saving after the same signal, and a second one would end that. They
        # notice by themselves that a process is gone, name it and stop.
        deadline=$((SECONDS + GRACE))
      fi
      unset "running[$pid]"
      end_groups "$pid"
    done
  done
}

# Leaves out the processes in `gone` and `hung`, with their GPUs, as long as MIN processes stay; otherwise only those in
# `gone`, since those in `hung` may have waited for them.
leave_out() {
  local i share=$((${#gpus[@]} / N)) left=() lost
  read -r -a lost <<<"$gone$hung"
  if ((N - ${#lost[@]} < MIN)); then
    hung=''
    read -r -a lost <<<"$gone"
  fi
  ((N - ${#lost[@]} >= MIN)) || return 0
  for ((i = 0; i < N; i++)); do
    [[ $gone$hung == *" $i "* ]] || left+=("${gpus[@]:i*share:share}")
  done
  gpus=("${left[@]}") N=$((N - ${#lost[@]}))
}

for ((restart = 1; ; restart++)); do
  start_all
  wait_for_all
  # Another failure would only repeat itself.
  if [[ -n $stopped ]] || ((restart > RESTARTS)) || { ((first != 75 && first != 134)) && ! is_gone "$first"; }; then break; fi
  leave_out
  printf '%s: process %s ended with status %s; restart %s of %s, with %s processes\n' \
    "${0##*/}" "$who" "$first" "$restart" "$RESTARTS" "$N" >&2
done
exit "$first"
