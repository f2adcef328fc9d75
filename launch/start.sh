#!/usr/bin/env bash
# Your own data on this machine: sets up .venv, then runs `prefixmem start` with your arguments.
#   launch/start.sh ITEMS INTERACTIONS --out DIR [KEY=VALUE ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
case "${1:-}" in -h | --help) sed -n '2,3s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
set_up .venv
exec "$root/.venv/bin/prefixmem" start "$@"
