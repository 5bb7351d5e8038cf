#!/usr/bin/env bash
# One run on every worker of a Cloud TPU slice.
#
#   PROJECT=... ZONE=... ACCELERATOR=v5litepod-16 launch/tpu.sh up --config=... --workdir=...
#
#   up ARGS     create, sync, run and logs, one after the other; the same command again after pre-emption
#   create      requests a queued resource, or takes the one of this name, and waits until it is ACTIVE
#   sync        copies the tracked files of this checkout, as they are, to all workers and installs them
#   run ARGS    starts `python -m crate_jax.main ARGS` on all workers, in the background
#   logs        follows the log of one worker until its process ends; Ctrl-C leaves the run alone
#   stop        SIGTERM to all workers: state saved, `run` continues
#   delete      deletes the queued resource and its machines
#
# --dry-run prints the commands; where they depend on what `create` finds, those of a new resource.
#
#   PROJECT, ZONE   where (needed)
#   ACCELERATOR     kind and size, such as v5litepod-16, v6e-16, v5p-16, v4-16 (needed by create and up)
#   NAME            of the queued resource and its machines (crate-jax)
#   SPOT            1: cheaper, can be pre-empted (0)
#   SLICES          number of slices, joined over the data-centre network (1)
#   RUNTIME         machine image (by the accelerator's kind)
#   WAIT, POLL      seconds to wait for ACTIVE, and between two looks (3600, 30)
#   SETUP           a command for every worker before the installation, such as the mount of a shared file system
#   WORKER          whose log is followed (0)
#
# The workdir must be a folder that all workers share and that outlives the slice. JAX finds its processes from the
# TPU's metadata.

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
COMMAND=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
NAME=${NAME:-crate-jax} SPOT=${SPOT:-0} SLICES=${SLICES:-1} WAIT=${WAIT:-3600} POLL=${POLL:-30} WORKER=${WORKER:-0}

case $COMMAND in
  up | run) ;;
  create | sync | logs | stop | delete) ((${#ARGS[@]} == 0)) || fail "$COMMAND takes no argument, got ${ARGS[0]}" ;;
  '') fail "no command: one of up, create, sync, run, logs, stop, delete; --help says more" ;;
  *) fail "$COMMAND: must be one of up, create, sync, run, logs, stop, delete" ;;
esac
need PROJECT "the Google Cloud project"
need ZONE "the zone of the TPU, as in ZONE=us-west4-a"
need_label NAME
need_switch SPOT
need_count SLICES
need_count WAIT
need_count POLL
need_count WORKER 0

if [[ $COMMAND == create || $COMMAND == up ]]; then
  need ACCELERATOR "kind and size of the TPU, as in ACCELERATOR=v5litepod-16"
  [[ $ACCELERATOR =~ ^(v5litepod|v6e|v5p|v4|v3|v2)-[1-9][0-9]*$ ]] ||
    fail "ACCELERATOR=$ACCELERATOR: must be v5litepod-N, v6e-N, v5p-N, v4-N, v3-N or v2-N"
  case ${ACCELERATOR%-*} in
    v5litepod) image=v2-alpha-tpuv5-lite ;;
    v6e) image=v2-alpha-tpuv6e ;;
    v5p) image=v2-alpha-tpuv5 ;;
    *) image=tpu-ubuntu2204-base ;;
  esac
  RUNTIME=${RUNTIME:-$image}
fi

PLACE=(--project="$PROJECT" --zone="$ZONE")
NODES=("$NAME")
NODE_OPTIONS=(--node-id="$NAME")
if ((SLICES > 1)); then
  NODES=()
  for ((i = 0; i < SLICES; i++)); do NODES+=("$NAME-$i"); done
  NODE_OPTIONS=(--node-count="$SLICES" --node-prefix="$NAME")
fi

queued() { run gcloud compute tpus queued-resources "$@" "${PLACE[@]}"; }

# on WORKERS COMMAND...: on these workers of every slice, whatever becomes of it on one; the words reach the workers as
# they stand here.
on() {
  local workers=$1 status=0 node
  shift
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --quiet --worker="$workers" --command="$(show "$@")" ||
      status=$?
  done
  return "$status"
}

# "STATE ACCELERATOR" of the queued resource, or nothing. A list, since an empty one is no error: a describe that fails
# would not tell a resource that is not there from a project that is not ours.
look() {
  queued list --filter="name~/$NAME$" --format='value(state.state,tpu.nodeSpec[0].node.acceleratorType)'
}

request() {
  local spot=()
  ((SPOT == 0)) || spot=(--spot)
  queued create "$NAME" "${NODE_OPTIONS[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${spot[@]}"
}

delete() { queued delete "$NAME" --force --quiet; }

create() {
  local state kind found end=$((SECONDS + WAIT))
  if [[ -n $DRY_RUN ]]; then
    look
    request
    look
    return
  fi
  found=$(look)
  read -r state kind <<<"$found" || true
  [[ -z $kind || ${kind##*/} == "$ACCELERATOR" ]] ||
    fail "NAME=$NAME is a ${kind##*/}, not the $ACCELERATOR asked for: another NAME, or delete it first"
  case $state in
    '') request ;;
    FAILED | SUSPENDING | SUSPENDED) # pre-empted, or never granted: it does not come back
      delete
      request
      ;;
  esac
  while true; do
    found=$(look) || found=unknown # an hour's wait should outlast a lost connection
    state=${found%%[[:space:]]*}
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED)
        echo "tpu.sh: $NAME is $state: create asks for a new one" >&2
        exit 1
        ;;
    esac
    if ((SECONDS + POLL > end)); then
      echo "tpu.sh: $NAME is still ${state:-not there} after WAIT=$WAIT seconds; create goes on waiting" >&2
      exit 1
    fi
    echo "$NAME is ${state:-not there yet}"
    sleep "$POLL"
  done
  echo "$NAME is ACTIVE"
}

sync() {
  local root tree node
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  git -C "$root" rev-parse --verify --quiet HEAD >/dev/null || fail "$root is not a git checkout, which sync copies"
  # The working tree as a commit that no branch knows; nothing is printed when nothing is changed.
  tree=$(git -C "$root" stash create)
  ARCHIVE=${TMPDIR:-/tmp}/crate_jax.$$.tar.gz
  trap 'rm -f "$ARCHIVE"' EXIT
  run git -C "$root" archive --format=tar.gz --output="$ARCHIVE" "${tree:-HEAD}"
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$node:crate_jax.tar.gz" "${PLACE[@]}" --quiet --worker=all
  done
  # A fresh folder, so that no file stays that is gone here.
  # Under the lock of tpu_worker.sh: a run that is going on would lose its code.
  on all bash -c 'if ! flock --nonblock crate_jax.lock rm -rf crate_jax; then echo "a run is going on here; stop it first" >&2; exit 2; fi; mkdir crate_jax && tar -xzf crate_jax.tar.gz -C crate_jax'
  on all crate_jax/launch/tpu_worker.sh setup ${SETUP:+"$SETUP"}
}

start() { on all crate_jax/launch/tpu_worker.sh run "${ARGS[@]}"; }

logs() {
  NODES=("${NODES[0]}")
  on "$WORKER" crate_jax/launch/tpu_worker.sh logs
}

case $COMMAND in
  up)
    create
    sync
    start
    logs
    ;;
  run) start ;;
  stop) on all crate_jax/launch/tpu_worker.sh stop ;;
  *) "$COMMAND" ;;
esac
