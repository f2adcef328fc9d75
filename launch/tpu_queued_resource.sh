#!/usr/bin/env bash
# Asks for a TPU pod slice, waits until there is one, trains on it, and gives it back.
#   TPU_NAME=NAME ZONE=ZONE ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite [PROJECT=ID] [SPOT=yes] \
#     launch/tpu_queued_resource.sh CONFIG --out DIR [--logs FOLDER] [--dry-run] [arguments of `prefixmem train`]
# What trains is launch/tpu_vm.sh, whose --help says what its options do (--logs FOLDER: the workers' logs
# are fetched before the slice is given back; --tail from elsewhere shows them). A run whose slice was
# taken away goes on when the same command is called again. It waits up to WAIT_HOURS (24). --dry-run
# prints exactly the commands that would run.
set -euo pipefail
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ $# -ge 1 ] || usage 2
case "$1" in -h|--help) usage 0 ;; -*) usage 2 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
for name in TPU_NAME ZONE ACCELERATOR RUNTIME; do
  [ -n "${!name:-}" ] || { echo "tpu_queued_resource.sh: set $name (see --help)" >&2; exit 2; }
done
dry_run=no
for argument in "$@"; do [ "$argument" != --dry-run ] || dry_run=yes; done
where=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project "$PROJECT")
ask=(gcloud compute tpus queued-resources)
create=("${ask[@]}" create "$TPU_NAME" --node-id "$TPU_NAME" "${where[@]}"
  --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME")
[ "${SPOT:-no}" = no ] || create+=(--spot)
describe=("${ask[@]}" describe "$TPU_NAME" "${where[@]}" "--format=value(state.state)")
delete=("${ask[@]}" delete "$TPU_NAME" "${where[@]}" --force --quiet)
if [ "$dry_run" = yes ]; then
  "$root/launch/tpu_vm.sh" "$@" >/dev/null
  show "${create[@]}"
  show "${describe[@]}"
  "$root/launch/tpu_vm.sh" "$@"
  show "${delete[@]}"
  exit 0
fi
"$root/launch/tpu_vm.sh" "$@" --dry-run >/dev/null # mistakes are found before anything is asked for
"${create[@]}"
trap '"${delete[@]}"' EXIT
state=WAITING
for ((minute = 0; minute < ${WAIT_HOURS:-24} * 60; minute++)); do
  state=$("${describe[@]}")
  case "$state" in
    ACTIVE) break ;;
    FAILED | SUSPENDED) echo "tpu_queued_resource.sh: $TPU_NAME is $state" >&2; exit 1 ;;
  esac
  [ $((minute % 10)) -ne 0 ] || echo "tpu_queued_resource.sh: $TPU_NAME is $state after $minute minutes" >&2
  sleep "${POLL_SECONDS:-60}"
done
[ "$state" = ACTIVE ] || { echo "tpu_queued_resource.sh: no $TPU_NAME after ${WAIT_HOURS:-24} hours" >&2; exit 1; }
"$root/launch/tpu_vm.sh" "$@"
