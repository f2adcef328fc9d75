#!/usr/bin/env bash
# All checks on this machine: sets up .venv with the test extra, then ruff and pytest.
#   tests/run.sh [arguments of pytest]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
set_up test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@" tests
