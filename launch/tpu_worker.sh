#!/usr/bin/env bash
# What tpu.sh runs on each worker of a slice, in the home folder, which holds the checkout crate_jax/.
#
#   setup [COMMAND]   runs COMMAND in a shell, makes crate_jax_env/ with a Python of its own, installs crate_jax[tpu]
#   run ARGS          starts `python -m crate_jax.main ARGS` in the background; refuses while another one runs
#   logs              the end of crate_jax.log and what comes, until the run ends
#   stop              SIGTERM to the run
#
# --dry-run prints the commands.

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
COMMAND=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=$PWD

# The lock is held as long as the run, or anything it started, lives: unlike a process id it cannot be another's.
is_running() { ! flock --nonblock "$HERE/crate_jax.lock" true; }

setup() {
  if ((${#ARGS[@]})); then run bash -c "${ARGS[0]}"; fi
  # The images' Python is older than ours; uv brings one.
  run python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --allow-existing --python 3.12 "$HERE/crate_jax_env"
  run python3 -m uv pip install --quiet --python "$HERE/crate_jax_env/bin/python" --editable "$HERE/crate_jax[tpu]"
}

start() {
  # The shell inside becomes the run, so the number it leaves is the run's own.
  local command=(
    flock --nonblock "$HERE/crate_jax.lock" bash -c 'echo $$ >crate_jax.pid; cd crate_jax; exec "$@"' bash
    "$HERE/crate_jax_env/bin/python" -u -m crate_jax.main "${ARGS[@]}"
  )
  if [[ -n $DRY_RUN ]]; then
    show setsid nohup "${command[@]}"
    return
  fi
  ! is_running || fail "a run is going on here; stop it first"
  rm -f crate_jax.pid
  # setsid and nohup: the connection that started it may end
  # shellcheck disable=SC2016
  setsid nohup bash -c 'status=0; "$@" || status=$?; echo "ended with status $status"' bash "${command[@]}" \
    </dev/null >>crate_jax.log 2>&1 &
  for ((i = 0; i < 50; i++)); do
    [[ ! -s crate_jax.pid ]] || return 0
    sleep 0.1
  done
  fail "the run did not start; see $HERE/crate_jax.log"
}

# Sets PID to the process id of the run that was started last.
find_run() {
  PID=$(cat crate_jax.pid 2>/dev/null) || PID=''
  [[ -n $PID || -n $DRY_RUN ]] || fail "nothing was started here"
}

logs() {
  find_run
  run tail -n 1000 --pid="${PID:-PID}" -F crate_jax.log
}

stop() {
  find_run
  if [[ -z $DRY_RUN ]] && ! is_running; then
    echo "nothing runs here any more"
  else
    run kill -s TERM "${PID:-PID}"
  fi
}

case $COMMAND in
  setup) setup ;;
  run) start ;;
  logs | stop) "$COMMAND" ;;
  *) fail "${COMMAND:-no command}: must be one of setup, run, logs, stop" ;;
esac
