#!/usr/bin/env bash
# Trains one config on every worker of a TPU pod slice.
#   TPU_NAME=NAME ZONE=ZONE [PROJECT=ID] launch/tpu_vm.sh CONFIG --out DIR [--dry-run] [arguments of `prefixmem train`]
# CONFIG is a path within this repository; DIR is gs://BUCKET/RUN, or a folder that all workers share
# (the data that the config names likewise). Workers need Python 3.11 to 3.13. What is
# committed (HEAD) is copied, not edits beside it. The repository is copied to every worker, installed
# there with the TPU build of JAX, and `prefixmem train CONFIG --distributed ...` is started on
# all of them. --dry-run prints exactly the commands that would run, and runs none.
set -euo pipefail
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ $# -ge 1 ] || usage 2
case "$1" in -h|--help) usage 0 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
config=$1; shift
dry_run=no
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
done
for name in TPU_NAME ZONE; do
  [ -n "${!name:-}" ] || { echo "tpu_vm.sh: set $name (see --help)" >&2; exit 2; }
done
[ -f "$root/$config" ] || { echo "tpu_vm.sh: $config: no such file in the repository" >&2; exit 2; }
case " ${arguments[*]} " in *" --out "*) ;; *) echo "tpu_vm.sh: --out is needed: gs://BUCKET/RUN, or a folder that all workers share" >&2; exit 2 ;; esac

where=(--zone "$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project "$PROJECT")
run() {
  if [ "$dry_run" = yes ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
archive=$(mktemp -u "${TMPDIR:-/tmp}/prefixmem_jax.XXXXXX").tar.gz
[ "$dry_run" = no ] || archive=/tmp/prefixmem_jax.tar.gz
trap 'rm -f "$archive"' EXIT
train=$(printf '%q ' .venv/bin/prefixmem train "$config" --distributed "${arguments[@]}")
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:prefixmem_jax.tar.gz" "${where[@]}"
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command \
  "mkdir -p prefixmem_jax && tar -xzf prefixmem_jax.tar.gz -C prefixmem_jax && cd prefixmem_jax && root=\$PWD && . launch/common.sh && set_up .venv tpu gcs"
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command "cd prefixmem_jax && ${train% }"
