#!/usr/bin/env bash
# Runs one run on all workers of a Cloud TPU slice.
#
#   PROJECT=... ZONE=... ACCELERATOR=v5litepod-16 launch/tpu.sh up --config=... --workdir=...
#
#   up ARGS     create, sync, run and logs, one after the other; after pre-emption repeat the same command
#   create      requests a queued resource, or takes the existing one of this name, and waits until it is ACTIVE
#   sync        copies the tracked files of this checkout, with their changes, to all workers and installs them
#   run ARGS    starts `python -m crate_jax.main ARGS` on all workers, in the background
#   logs        follows the log of one worker until its process ends; Ctrl-C does not stop the run
#   stop        sends SIGTERM to all workers; the run saves its state, from which `run` continues
#   delete      deletes the queued resource and its machines
#
# --dry-run prints the commands; `create` prints those for a new resource.
#
#   PROJECT, ZONE   Google Cloud project and zone (required)
#   ACCELERATOR     kind and size, such as v5litepod-16, v6e-16, v5p-16, v4-16, tpu7x-128 (required by create and up)
#   NAME            name of the queued resource and its machines (crate-jax)
#   SPOT            1: spot machines, which are cheaper and can be pre-empted (0)
#   RESERVED        1: machines of your project's reservation (0)
#   FLEX_START      time for which flex-start lends the machines, as in 4h (gcloud alpha)
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT, LABELS    passed to gcloud if set; LABELS as in team=vision,user=me
#   INTERNAL_IPS    1: machines without external addresses, reached through IAP (gcloud alpha) (0)
#   IAP             0: with INTERNAL_IPS=1, this machine is in their network and needs no IAP (1)
#   CREATE_ARGS     more options of `gcloud compute tpus queued-resources create`
#   SLICES          number of slices, which the data-centre network connects (1)
#   RUNTIME         machine image (depends on the accelerator's kind)
#   WAIT, POLL      seconds to wait for ACTIVE, seconds between two checks (3600, 30)
#   SETUP           a command for every worker before the installation, such as the mount of a shared file system
#   WORKER          number of the worker whose log is followed (0)
#   CRATE_JAX_SCRATCH    with a workdir in a bucket: a folder that all workers share, for the copy (not set)
#
# The workdir must be an absolute path of a folder that all workers share and that outlives the slice, or in a bucket.
# JAX finds its processes by the TPU's metadata. Google names Kubernetes first for TPU7x (kubernetes.sh with
# ACCELERATOR=tpu7x); not every project gets it here.

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_arguments "$@"
COMMAND=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
RESERVED=${RESERVED:-0} FLEX_START=${FLEX_START:-} INTERNAL_IPS=${INTERNAL_IPS:-0} IAP=${IAP:-1}
NAME=${NAME:-crate-jax} SPOT=${SPOT:-0} SLICES=${SLICES:-1} WAIT=${WAIT:-3600} POLL=${POLL:-30} WORKER=${WORKER:-0}

case $COMMAND in
  up | run) ;;
  create | sync | logs | stop | delete) ((${#ARGS[@]} == 0)) || fail "$COMMAND takes no argument, got ${ARGS[0]}" ;;
  '') fail "no command: must be one of up, create, sync, run, logs, stop, delete; --help says more" ;;
  *) fail "$COMMAND: must be one of up, create, sync, run, logs, stop, delete" ;;
esac
need PROJECT "the Google Cloud project"
need ZONE "the zone of the TPU, as in ZONE=us-west4-a"
need_label NAME
need_switch SPOT
need_switch RESERVED
need_one SPOT RESERVED FLEX_START
[[ -z $FLEX_START || $FLEX_START =~ ^[1-9][0-9]*[smhd]$ ]] || fail "FLEX_START=$FLEX_START: must be a time as in 4h"
need_switch INTERNAL_IPS
need_switch IAP
split CREATE_ARGS
need_count SLICES
need_count WAIT
need_count POLL
need_count WORKER 0

if [[ $COMMAND == create || $COMMAND == up ]]; then
  need ACCELERATOR "the kind and size of the TPU, as in ACCELERATOR=v5litepod-16"
  [[ $ACCELERATOR =~ ^(tpu7x|v5litepod|v6e|v5p|v4|v3|v2)-[1-9][0-9]*$ ]] ||
    fail "ACCELERATOR=$ACCELERATOR: must be v5litepod-N, v6e-N, v5p-N, v4-N, v3-N, v2-N or tpu7x-N"
  case ${ACCELERATOR%-*} in
    v5litepod) image=v2-alpha-tpuv5-lite ;;
    v6e) image=v2-alpha-tpuv6e ;;
    v5p) image=v2-alpha-tpuv5 ;;
    tpu7x) image=v2-alpha-tpu7-ubuntu2404 ;;
    *) image=tpu-ubuntu2204-base ;;
  esac
  RUNTIME=${RUNTIME:-$image}
fi

# The run works in crate_jax/, which the next sync deletes.
need_lasting_workdir "a relative one is deleted on the workers by the next up or sync"

# A host has at most 8 chips or cores, whichever the accelerator's number counts; without ACCELERATOR it is not known.
hosts=1
[[ ! ${ACCELERATOR:-} =~ -(9|[1-9][0-9]+)$ && $SLICES == 1 ]] || hosts=many
if [[ $hosts == many && ${WORKDIR:-} =~ ^(gs|s3):// && -z ${CRATE_JAX_SCRATCH:-} ]]; then
  echo "tpu.sh: warning: several workers need one folder for the copy of a bucket; without CRATE_JAX_SCRATCH, a folder that they share, the run is refused" >&2
fi

PLACE=(--project="$PROJECT" --zone="$ZONE")
NODES=("$NAME")
NODE_OPTIONS=(--node-id="$NAME")
if ((SLICES > 1)); then
  NODES=()
  for ((i = 0; i < SLICES; i++)); do NODES+=("$NAME-$i"); done
  NODE_OPTIONS=(--node-count="$SLICES" --node-prefix="$NAME")
fi

SSH=(gcloud) REACH=()
if ((INTERNAL_IPS && IAP)); then
  SSH+=(alpha) # where alone --tunnel-through-iap exists
  REACH=(--tunnel-through-iap)
elif ((INTERNAL_IPS)); then
  REACH=(--internal-ip)
fi

queued() { run gcloud compute tpus queued-resources "$@" "${PLACE[@]}"; }

# on WORKERS LINE: runs a line of shell on these workers of every slice, also after it failed on one.
on() {
  local status=0 node
  for node in "${NODES[@]}"; do
    run "${SSH[@]}" compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --quiet "${REACH[@]}" --worker="$1" --command="$2" ||
      status=$?
  done
  return "$status"
}

# Prints "STATE ACCELERATOR" of the queued resource; nothing if there is none. `list` does not fail if there is none; a
# failure of `describe` could also mean that the project is not ours.
resource_state() {
  queued list --filter="name~/$NAME$" --format='value(state.state,tpu.nodeSpec[0].node.acceleratorType)'
}

request_resource() {
  local options=() release=()
  ((SPOT == 0)) || options+=(--spot)
  ((RESERVED == 0)) || options+=(--reserved)
  ((INTERNAL_IPS == 0)) || options+=(--internal-ips)
  [[ -z ${NETWORK:-} ]] || options+=(--network="$NETWORK")
  [[ -z ${SUBNETWORK:-} ]] || options+=(--subnetwork="$SUBNETWORK")
  [[ -z ${SERVICE_ACCOUNT:-} ]] || options+=(--service-account="$SERVICE_ACCOUNT")
  [[ -z ${LABELS:-} ]] || options+=(--labels="$LABELS")
  if [[ -n $FLEX_START ]]; then
    release=(alpha)
    options+=(--provisioning-model=flex-start --max-run-duration="$FLEX_START")
  fi
  run gcloud "${release[@]}" compute tpus queued-resources create "$NAME" "${NODE_OPTIONS[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${options[@]}" "${WORDS[@]}" "${PLACE[@]}"
}

delete() { queued delete "$NAME" --force --quiet; }

create() {
  local state kind found end=$((SECONDS + WAIT))
  if [[ -n $DRY_RUN ]]; then
    resource_state
    request_resource
    resource_state
    return
  fi
  found=$(resource_state)
  read -r state kind <<<"$found" || true
  [[ -z $kind || ${kind##*/} == "$ACCELERATOR" ]] ||
    fail "NAME=$NAME is a ${kind##*/}, not the $ACCELERATOR of the settings; choose another NAME, or delete it"
  case $state in
    '') request_resource ;;
    FAILED | SUSPENDING | SUSPENDED) # pre-empted or never granted: it will not come back
      delete
      request_resource
      ;;
  esac
  while true; do
    found=$(resource_state) || found=unknown # a lost connection must not end the wait
    state=${found%%[[:space:]]*}
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED)
        echo "tpu.sh: $NAME is $state; run create again, which requests a new one" >&2
        exit 1
        ;;
    esac
    if ((SECONDS + POLL > end)); then
      echo "tpu.sh: $NAME is still ${state:-not there} after WAIT=$WAIT seconds; run create again to wait longer" >&2
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
  # This commits the working tree outside all branches; it prints nothing if nothing is changed.
  tree=$(git -C "$root" stash create)
  ARCHIVE=${TMPDIR:-/tmp}/crate_jax.$$.tar.gz
  trap 'rm -f "$ARCHIVE"' EXIT
  run git -C "$root" archive --format=tar.gz --output="$ARCHIVE" "${tree:-HEAD}"
  for node in "${NODES[@]}"; do
    run "${SSH[@]}" compute tpus tpu-vm scp "$ARCHIVE" "$node:crate_jax.tar.gz" "${PLACE[@]}" --quiet "${REACH[@]}" \
      --worker=all
  done
  # The folder is new, so that it holds no file that is deleted here. The lock of tpu_worker.sh is needed since a run
  # in progress would lose its code.
  on all 'flock --nonblock crate_jax.lock rm -rf crate_jax || { echo "a run is in progress here; stop it first" >&2; exit 2; }; mkdir crate_jax && tar -xzf crate_jax.tar.gz -C crate_jax'
  on all "$(show crate_jax/launch/tpu_worker.sh setup ${SETUP:+"$SETUP"})"
}

start() {
  on all "$(show ${CRATE_JAX_SCRATCH:+env CRATE_JAX_SCRATCH="$CRATE_JAX_SCRATCH"} crate_jax/launch/tpu_worker.sh run \
    "${ARGS[@]}")"
}

logs() {
  NODES=("${NODES[0]}")
  on "$WORKER" 'crate_jax/launch/tpu_worker.sh logs'
}

case $COMMAND in
  up)
    create
    sync
    start
    logs
    ;;
  run) start ;;
  stop) on all 'crate_jax/launch/tpu_worker.sh stop' ;;
  *) "$COMMAND" ;;
esac
