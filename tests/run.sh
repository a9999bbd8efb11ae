#!/usr/bin/env bash
# Sets up .venv, then lints and tests. Arguments go to pytest:
#
#   bash tests/run.sh                      everything that is not marked slow
#   bash tests/run.sh -m slow              the slow cases
#   bash tests/run.sh tests/config -x      one package, up to the first failure
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_venv.sh
bin="$PWD/.venv/bin"

echo "lint: ruff check"
"$bin/ruff" check --quiet .
echo "lint: ruff format --check"
"$bin/ruff" format --check --quiet .
echo "lint: import contracts"
"$bin/lint-imports" --no-cache >.venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }

# The last line is pytest's own.
exec "$bin/python" -m pytest "$@"
