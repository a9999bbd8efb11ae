# What the example scripts share; sourced, not run. They set `name` (for messages) before.

part="starting" child=""

on_error() {
  printf '\n%s: FAILED in %s (exit status %s)\n' "$name" "$part" "$1" >&2
  printf '  the message is above; finished steps are kept, and the same command continues from there\n' >&2
  exit 1
}
# Leaves no rank behind: SIGTERM lets the run save; one that does not end in time is killed.
on_exit() {
  local status=$? tries=0
  trap - ERR
  if [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; then
    echo "$name: stopping the training, which saves first" >&2
    while kill -0 "$child" 2>/dev/null && [ "$tries" -lt 60 ]; do
      sleep 1
      tries=$((tries + 1))
    done
    kill -KILL "$child" 2>/dev/null || true
  fi
  exit "$status"
}
trap 'on_error $?' ERR
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

begin() { part="$1"; printf '\n[%s] %s\n' "$1" "$2"; }
# "there: FILE", when all of the files are there.
have() {
  local file
  for file in "$@"; do [ -e "$file" ] || return 1; done
  printf '  there already: %s\n' "$*"
}
show() { printf '  $ python'; printf ' %q' "$@"; printf '\n'; }
python_shown() { show "$@"; "$python" "$@"; }
# Training in the background, so that a signal to the script reaches it.
train_shown() {
  show "$@"
  "$python" "$@" &
  child=$!
  wait "$child"
  child=""
}
# A path as a YAML value, whatever is in it.
quoted() {
  case "$1" in
    *[!A-Za-z0-9/._\ -]*) printf "'%s'" "${1//\'/\'\'}" ;;
    *) printf '%s' "$1" ;;
  esac
}
# The folder of an option: absolute, with a quoted ~ as the home folder.
absolute() {
  case "$1" in
    *\$*) wrong "--output $1: write the path out, without a \$" ;;
    "" | /*) printf '%s' "$1" ;;
    "~/"*) printf '%s' "$HOME/${1#"~/"}" ;;  # it was quoted, so the shell left it as it is
    *) printf '%s' "$PWD/$1" ;;
  esac
}
