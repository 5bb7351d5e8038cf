#!/usr/bin/env bash
# Starts one run as a JobSet on Kubernetes: one pod per host; all pods are restarted together when one is lost.
#
#   IMAGE=... CLAIM=... HOSTS=2 GPUS=8 launch/kubernetes.sh run --config=... --workdir=/shared/...
#   IMAGE=... CLAIM=... ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 launch/kubernetes.sh run ...
#
#   run ARGS    creates the JobSet, whose pods run `python -m crate_jax.main ARGS`
#   logs        follows the log of one pod
#   delete      deletes the JobSet; before that the run gets time to save
#
# --dry-run prints the command, for `run` with the whole manifest (kubernetes.yaml filled in).
#
#   IMAGE        container image with crate_jax installed (required by run)
#   CLAIM        persistent volume claim that all pods can write, mounted at /shared (required by run)
#   HOSTS        number of pods (required by run; for TPUs the topology says it)
#   GPUS         number of NVIDIA GPUs of each pod; 0: the CPU (0)
#   ACCELERATOR  GKE's name of the TPU: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice or tpu7x
#   TOPOLOGY     the TPU slice's topology, such as 4x4 or 2x2x2
#   CHIPS        number of TPU chips of each host (4, or all chips of a smaller topology)
#   SLICES       number of TPU slices (1)
#   SPOT         1: use GKE's spot nodes (0)
#   NAME         the JobSet's name (crate-jax)
#   NAMESPACE    the JobSet's namespace (kubectl's default)
#   RESTARTS     how often the pods are restarted (100)
#   NCCL_*       settings of NCCL for pods with GPUs; NCCL_DEBUG is WARN if it is not set
#   PYTHON       interpreter in the image (python)
#   RUN_AS       user id of the processes, such as that of the owner of CLAIM's files (the image's; of Dockerfile, 1000)
#   CRATE_JAX_TOKEN  text that a process must know to join the run (random; who may read the JobSet can read it)
#   WORKER       number of the pod whose log is followed (0)
#
# The cluster needs the JobSet controller, v0.7 or newer.

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# json WORD: prints the word as a JSON string.
json() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  printf '"%s"' "$word"
}

# json_list WORD...: prints the words as a JSON list.
json_list() {
  local word list=
  for word in "$@"; do list+=", $(json "$word")"; done
  printf '[%s]' "${list:2}"
}

# json_map KEY VALUE KEY VALUE...: prints them as a JSON object.
json_map() {
  local map=
  while (($#)); do
    map+=", $(json "$1"): $(json "$2")"
    shift 2
  done
  printf '{%s}' "${map:2}"
}

# json_variables NAME VALUE NAME VALUE...: prints them as environment variables of a container. Here and in its command
# Kubernetes replaces $(NAME), and $$ by $, so every $ is doubled.
json_variables() {
  local list=
  while (($#)); do
    list+=", {\"name\": $(json "$1"), \"value\": $(json "${2//\$/\$\$}")}"
    shift 2
  done
  printf '[%s]' "${list:2}"
}

read_arguments "$@"
COMMAND=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
NAME=${NAME:-crate-jax} GPUS=${GPUS:-0} SLICES=${SLICES:-1} SPOT=${SPOT:-0} RESTARTS=${RESTARTS:-100}
WORKER=${WORKER:-0} PYTHON=${PYTHON:-python} ACCELERATOR=${ACCELERATOR:-} TOPOLOGY=${TOPOLOGY:-}
need_label NAME
need_count WORKER 0
KUBECTL=(kubectl ${NAMESPACE:+--namespace="$NAMESPACE"})

case $COMMAND in
  run) ;;
  logs)
    run "${KUBECTL[@]}" logs --follow --tail=-1 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=$WORKER"
    exit
    ;;
  delete)
    run "${KUBECTL[@]}" delete jobset "$NAME"
    exit
    ;;
  *) fail "${COMMAND:-no command}: must be one of run, logs, delete" ;;
esac

need IMAGE "the container image with crate_jax installed"
need CLAIM "the persistent volume claim for workdir and data, mounted at /shared"
need_count GPUS 0
need_count SLICES
need_switch SPOT
need_count RESTARTS 0
[[ -z ${RUN_AS:-} ]] || need_count RUN_AS 0
need_lasting_workdir "a relative one is lost with its pod, at each restart; /shared outlives it"

selector=() resources=() annotations=()
if [[ -n $ACCELERATOR ]]; then
  case $ACCELERATOR in
    tpu-v5-lite-podslice | tpu-v6e-slice | tpu-v5p-slice | tpu-v4-podslice | tpu7x) ;;
    *) fail "ACCELERATOR=$ACCELERATOR: must be tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice or tpu7x" ;;
  esac
  need TOPOLOGY "the topology of the TPU slice, as in TOPOLOGY=4x4"
  [[ $TOPOLOGY =~ ^[1-9][0-9]?(x[1-9][0-9]?){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY: must be like 4x4 or 2x2x2"
  ((GPUS == 0)) || fail "GPUS=$GPUS and ACCELERATOR=$ACCELERATOR: must be one or the other"
  all=$((${TOPOLOGY//x/ * }))
  CHIPS=${CHIPS:-$((all < 4 ? all : 4))}
  need_count CHIPS
  ((all % CHIPS == 0)) || fail "TOPOLOGY=$TOPOLOGY: $all chips cannot be cut into hosts of CHIPS=$CHIPS"
  HOSTS=${HOSTS:-$((all / CHIPS))}
  need_count HOSTS
  ((HOSTS == all / CHIPS)) || fail "HOSTS=$HOSTS: TOPOLOGY=$TOPOLOGY has $((all / CHIPS)) hosts of $CHIPS chips"
  selector=(cloud.google.com/gke-tpu-accelerator "$ACCELERATOR" cloud.google.com/gke-tpu-topology "$TOPOLOGY")
  resources=(google.com/tpu "$CHIPS")
  # Each slice needs a node pool of its own, since no wires connect the chips of two pools.
  annotations=(alpha.jobset.sigs.k8s.io/exclusive-topology cloud.google.com/gke-nodepool)
else
  need HOSTS "the number of pods, as in HOSTS=2"
  need_count HOSTS
  ((SLICES == 1)) || fail "SLICES=$SLICES: only TPUs have slices; HOSTS is the number of pods"
  ((GPUS == 0)) || resources=(nvidia.com/gpu "$GPUS")
fi
variables=(PYTHONUNBUFFERED 1)
if [[ -z $ACCELERATOR ]]; then
  variables+=(CRATE_JAX_TOKEN "${CRATE_JAX_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}")
fi
if ((GPUS)); then
  NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  for name in "${!NCCL_@}"; do variables+=("$name" "${!name}"); done
fi
((SPOT == 0)) || selector+=(cloud.google.com/gke-spot true)

command=("$PYTHON" -m crate_jax.main "${ARGS[@]}")
command=("${command[@]//\$/\$\$}") # as in json_variables
# On TPUs, JAX gets these three from GKE. Kubernetes replaces JOB_COMPLETION_INDEX by the pod's number.
# shellcheck disable=SC2016
[[ -n $ACCELERATOR ]] || command+=(
  "--coordinator_address=$NAME-host-0-0.$NAME:8476" "--num_processes=$HOSTS" '--process_id=$(JOB_COMPLETION_INDEX)'
)

declare -A values=(
  [NAME]=$(json "$NAME") [RESTARTS]=$RESTARTS [SLICES]=$SLICES [HOSTS]=$HOSTS
  [IMAGE]=$(json "$IMAGE") [CLAIM]=$(json "$CLAIM") [COMMAND]=$(json_list "${command[@]}")
  [SECURITY]="{${RUN_AS:+\"runAsUser\": $RUN_AS}}"
  [NODE_SELECTOR]=$(json_map "${selector[@]}") [RESOURCES]=$(json_map "${resources[@]}")
  [VARIABLES]=$(json_variables "${variables[@]}") [ANNOTATIONS]=$(json_map "${annotations[@]}")
)
manifest=
while IFS= read -r line; do
  # Each line has at most one ${NAME}, at its end, so that nothing is replaced inside a value.
  if [[ $line != '#'* && $line =~ ^(.*)\$\{([A-Z_]+)\}$ ]]; then line=${BASH_REMATCH[1]}${values[${BASH_REMATCH[2]}]}; fi
  [[ $line == '#'* ]] || manifest+=$line$'\n'
done <"$(dirname "${BASH_SOURCE[0]}")/kubernetes.yaml"

if [[ -n $DRY_RUN ]]; then
  printf "%s <<'EOF'\n%sEOF\n" "$(show "${KUBECTL[@]}" create --filename=-)" "$manifest"
else
  run "${KUBECTL[@]}" create --filename=- <<<"$manifest"
fi
