# shellcheck shell=bash
# Every launcher sources this file: --help and --dry-run, checks of the settings, and how to run or show a command.

# is_new_enough MAJOR MINOR: whether a bash of this version can run the launchers. Before 4.4, with `set -u`, an empty
# array is an unbound variable. This and the next statement stand first, and are such that bash 3.2 (macOS) reads them.
is_new_enough() { (($1 > 4 || ($1 == 4 && $2 >= 4))); }
if ! is_new_enough "${BASH_VERSINFO[0]}" "${BASH_VERSINFO[1]}"; then
  printf '%s: needs bash 4.4 or newer, this is %s\n' "${0##*/}" "$BASH_VERSION" >&2
  exit 2
fi

set -euo pipefail

# Prints one line and ends with status 2, which stands for the user's mistake, as in crate_jax.main: nothing retries it.
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Removes --help and --dry-run from the arguments, wherever they stand, and puts the others into ARGS.
# The help is the comment at the top of the script, so that the two cannot differ.
read_arguments() {
  DRY_RUN='' ARGS=()
  local argument
  for argument in "$@"; do
    case $argument in
      --help | -h)
        sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
      --dry-run) DRY_RUN=yes ;;
      *) ARGS+=("$argument") ;;
    esac
  done
}

# need NAME MEANING: fails unless the setting NAME has a value.
need() { [[ -n ${!1:-} ]] || fail "$1 is not set: $2"; }

# need_count NAME [MIN]: fails unless NAME is a whole number, at least MIN (1).
need_count() {
  # at most ten digits, since bash's numbers have 64 bits; no leading 0, since 08 would be a bad octal number
  [[ ${!1:-} =~ ^(0|[1-9][0-9]{0,9})$ && ${!1} -ge ${2:-1} ]] ||
    fail "$1=${!1:-}: must be a whole number, ${2:-1} or more"
}

# need_label NAME: fails unless NAME can be part of a host name, which clouds and clusters require.
need_label() {
  [[ ${!1:-} =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
    fail "$1=${!1:-}: must be lower-case letters, digits and '-', starting with a letter, 50 at most"
}

# need_switch NAME: fails unless NAME is 0 or 1.
need_switch() { [[ ${!1} == [01] ]] || fail "$1=${!1}: must be 0 or 1"; }

# need_one SETTING...: fails if more than one of these settings is given.
need_one() {
  local name given=()
  for name in "$@"; do [[ -z ${!name:-} || ${!name} == 0 ]] || given+=("$name=${!name}"); done
  ((${#given[@]} < 2)) || fail "${given[0]} and ${given[1]}: must be one or the other"
}

# need_lasting_workdir REASON: fails if the workdir of ARGS is a relative path, for this reason. Sets WORKDIR to the
# workdir, the last one, as absl reads them; without one it is not set.
need_lasting_workdir() {
  local argument before=''
  unset WORKDIR
  for argument in "${ARGS[@]}"; do
    case $argument in
      --workdir=* | -workdir=*) WORKDIR=${argument#*=} ;;
      *) [[ $before != --workdir && $before != -workdir ]] || WORKDIR=$argument ;;
    esac
    before=$argument
  done
  [[ ${WORKDIR-/} =~ ^(/|(gs|s3)://) ]] ||
    fail "--workdir=$WORKDIR: must be an absolute path, gs://BUCKET/PATH or s3://BUCKET/PATH: $1"
}

# split NAME: puts the setting's options into WORDS, split as a shell does it, with quotes but without patterns.
split() {
  # shellcheck disable=SC2034
  WORDS=()
  (set -f && eval "WORDS=(${!1:-})") 2>/dev/null || fail "$1=${!1}: must be options with blanks between them"
  set -f
  eval "WORDS=(${!1:-})"
  set +f
}

# Prints a command as one line that a shell reads as the same command. Words with other than plain characters stand in
# quotes, of the other kind around a command that has quotes itself, so that a person can read it too.
show() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    if [[ $word == *[[:cntrl:]]* ]]; then
      printf -v word '%q' "$word"
    elif [[ $word == *\'* && $word != *[\"\$\`\\!]* ]]; then
      word="\"$word\""
    elif [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/"$quote"}'"
    fi
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() {
  if [[ -n $DRY_RUN ]]; then
    show "$@"
  else
    command -v "$1" >/dev/null || fail "$1 is not on the PATH"
    "$@"
  fi
}
