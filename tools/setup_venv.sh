#!/usr/bin/env bash
# Makes .venv in the repository root and installs the project into it, editable, with the versions
# of configs/constraints.txt. Run again, it returns at once unless pyproject.toml, the constraints
# or the Python changed.
#
#   bash tools/setup_venv.sh
#
#   EQUILIBRIUM_PYTHON   the Python to use (3.12 or newer); default: found on PATH or under pyenv
#   EQUILIBRIUM_EXTRAS   extras to install, comma separated; default: dev
#   PIP_INDEX_URL and pip's other settings are obeyed
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="$ROOT/.venv"
STAMP="$VENV/.equilibrium-installed"  # written last, so an install cut short never counts as one
HALF_MADE="$VENV/.equilibrium-installing"
LOG="$VENV/equilibrium-install.log"
EXTRAS="${EQUILIBRIUM_EXTRAS:-dev}"
unset PYTHONHOME

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# Prints "3.12.1" when $1 runs and is CPython 3.12 or newer with venv; fails otherwise. pyenv's shims
# exist for versions that are switched off, so that a name is on PATH proves nothing.
version_of() {
  "$1" -c '
import sys, venv, ensurepip
if sys.version_info < (3, 12):
    sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# The version of .venv's Python, when .venv is a whole environment. bin/python alone is not enough:
# without pyvenv.cfg it is the Python that it links to, and pip would install into that.
venv_version_of() {
  [ -f "$VENV/pyvenv.cfg" ] && version_of "$VENV/bin/python" &&
    "$VENV/bin/python" -I -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
}

# Prints the path of the first Python that fits: 3.12 (tested), then 3.13, then any newer one.
find_python() {
  local minor candidate pyenv_root="${PYENV_ROOT:-$HOME/.pyenv}"
  for minor in 3.12 3.13; do
    if version_of "python$minor" >/dev/null; then
      command -v "python$minor"
      return 0
    fi
    for candidate in "$pyenv_root/versions/$minor".*/bin/python; do
      if [ -x "$candidate" ] && version_of "$candidate" >/dev/null; then
        printf '%s\n' "$candidate"
        return 0
      fi
    done
  done
  for candidate in python3 python "$pyenv_root"/versions/3.*/bin/python; do
    if command -v "$candidate" >/dev/null && version_of "$candidate" >/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# What the install depends on. The path counts: a venv that was moved does not work.
fingerprint() {
  printf '%s python=%s extras=%s root=%s\n' \
    "$(cat pyproject.toml configs/constraints.txt | cksum | tr ' ' '-')" "$1" "$EXTRAS" "$ROOT"
}

python_version=""
if [ -n "${EQUILIBRIUM_PYTHON:-}" ]; then
  python_version="$(version_of "$EQUILIBRIUM_PYTHON")" ||
    fail "EQUILIBRIUM_PYTHON=$EQUILIBRIUM_PYTHON is not a Python 3.12 or newer with the venv module."
fi

venv_version="$(venv_version_of)" || venv_version=""
if [ -n "$venv_version" ] && [ -f "$STAMP" ] && [ ! -e "$HALF_MADE" ] &&
  [ "${python_version:-$venv_version}" = "$venv_version" ] &&
  [ "$(cat "$STAMP")" = "$(fingerprint "$venv_version")" ]; then
  say "using .venv (Python $venv_version)"
  exit 0
fi

if [ -n "$venv_version" ] && [ "${python_version:-$venv_version}" != "$venv_version" ]; then
  [ -f "$STAMP" ] || [ -e "$HALF_MADE" ] ||
    fail "$VENV has Python $venv_version, and EQUILIBRIUM_PYTHON asks for $python_version." \
      "This script did not make that folder: move it away, then run this again."
  venv_version=""
fi

if [ -z "$venv_version" ] || [ -e "$HALF_MADE" ]; then
  if [ -n "${EQUILIBRIUM_PYTHON:-}" ]; then
    python="$EQUILIBRIUM_PYTHON"
  else
    python="$(find_python)" || fail \
      "no Python 3.12 or newer was found on PATH or under pyenv. Get one, for example:" \
      "  pyenv:          pyenv install 3.12" \
      "  macOS:          brew install python@3.12" \
      "  Ubuntu, Debian: apt-get install python3.12 python3.12-venv (or python3 python3-venv where that is 3.12+)" \
      "  conda:          conda create -n py312 python=3.12 && conda activate py312" \
      "then run this again, or name it: EQUILIBRIUM_PYTHON=/path/to/python3.12"
  fi
  say "making .venv with Python $(version_of "$python") ($python)"
  rm -f "$VENV/bin/python"  # first, so that a folder deleted by half is not taken for a venv
  rm -rf "$VENV"
  mkdir "$VENV"
  touch "$HALF_MADE"
  "$python" -m venv "$VENV" >"$LOG" 2>&1 ||
    fail "$python -m venv failed (see $LOG):" "$(tail -n 5 "$LOG")"
  venv_version="$(venv_version_of)" || fail "$VENV is not a working environment: remove it"
else
  touch "$HALF_MADE"
fi

say "installing the project and its dependencies into .venv"
if [ "$(uname -s)" = Linux ] && ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  say "on Linux, torch brings its CUDA libraries (several GB): the first install takes some minutes"
fi
started=$(date +%s)
# -I: packages on PYTHONPATH must not count as installed.
# --require-virtualenv: pip refuses to touch any other Python.
if ! "$VENV/bin/python" -I -m pip --require-virtualenv --disable-pip-version-check install --progress-bar off \
  --constraint configs/constraints.txt --editable ".[$EXTRAS]" >"$LOG" 2>&1; then
  rm -f "$HALF_MADE"  # pip rolls back what it could not finish
  tail -n 15 "$LOG" >&2
  fail "the install failed; all of pip's output is in $LOG." \
    "If it is a download that failed, run this again: what was downloaded is kept."
fi
fingerprint "$venv_version" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
rm -f "$HALF_MADE"
say "installed in $(($(date +%s) - started)) s"
