#!/usr/bin/env bash
# The main job on this machine: sets up .venv, then runs `prefixmem quickstart` with your arguments.
#   launch/quickstart.sh [--data DIR] [--out DIR] [KEY=VALUE ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
set_up
exec "$root/.venv/bin/prefixmem" quickstart "$@"
