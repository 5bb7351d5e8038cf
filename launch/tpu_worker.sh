#!/usr/bin/env bash
# tpu.sh runs this script on each worker of a slice, in the home folder, which holds the checkout crate_jax/.
#
#   setup [COMMAND]   runs COMMAND in a shell, makes crate_jax_env/ with its own Python, installs crate_jax[tpu]
#   run ARGS          starts `python -m crate_jax.main ARGS` in the background; fails while another run is in progress
#   logs              prints the end of crate_jax.log and follows it until the run ends
#   stop              sends SIGTERM to the run
#
# --dry-run prints the commands.

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
COMMAND=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=$PWD

# The run, and all that it started, hold the lock as long as they live. Unlike a process id it cannot belong to another
# process.
is_running() { ! flock --nonblock "$HERE/crate_jax.lock" true; }

setup() {
  if ((${#ARGS[@]})); then run bash -c "${ARGS[0]}"; fi
  # The Python of the machine images is too old; uv installs a newer one.
  run python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --allow-existing --python 3.12 "$HERE/crate_jax_env"
  run python3 -m uv pip install --quiet --python "$HERE/crate_jax_env/bin/python" --editable "$HERE/crate_jax[tpu]"
}

start() {
  # The inner shell turns into the run, so the process id that it writes is the run's.
  local command=(
    flock --nonblock "$HERE/crate_jax.lock" bash -c 'echo $$ >crate_jax.pid; cd crate_jax; exec "$@"' bash
    "$HERE/crate_jax_env/bin/python" -u -m crate_jax.main "${ARGS[@]}"
  )
  if [[ -n $DRY_RUN ]]; then
    printf '%s </dev/null >>crate_jax.log 2>&1 &\n' "$(show setsid nohup "${command[@]}")"
    return
  fi
  ! is_running || fail "a run is in progress here; stop it first"
  rm -f crate_jax.pid
  # setsid and nohup keep the run alive after the connection has ended.
  # shellcheck disable=SC2016
  setsid nohup bash -c 'status=0; "$@" || status=$?; echo "ended with status $status"' bash "${command[@]}" \
    </dev/null >>crate_jax.log 2>&1 &
  for ((i = 0; i < 50; i++)); do
    [[ ! -s crate_jax.pid ]] || return 0
    sleep 0.1
  done
  fail "the run did not start; read $HERE/crate_jax.log"
}

# Sets PID to the process id of the last run that was started here.
find_run() {
  PID=$(cat crate_jax.pid 2>/dev/null) || PID=''
  [[ -n $PID || -n $DRY_RUN ]] || fail "no run was started here"
}

logs() {
  find_run
  run tail -n 1000 --pid="${PID:-PID}" -F crate_jax.log
}

stop() {
  find_run
  if [[ -z $DRY_RUN ]] && ! is_running; then
    echo "no run is in progress here"
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
