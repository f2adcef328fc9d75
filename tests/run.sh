#!/usr/bin/env bash
# All checks on this machine: sets up .venv-test with the test extra and the TPU compiler, then ruff
# and pytest. (An environment of its own: with the TPU compiler there, JAX looks for a TPU.)
#   tests/run.sh [arguments of pytest]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
set_up .venv-test test tpu
cd "$root"
export PATH="$root/.venv-test/bin:$PATH"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
python -m pytest -n 2 --dist worksteal "$@" tests
