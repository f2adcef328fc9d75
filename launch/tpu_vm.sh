#!/usr/bin/env bash
# Trains one config on every worker of a TPU pod slice.
#   TPU_NAME=NAME ZONE=ZONE [PROJECT=ID] launch/tpu_vm.sh CONFIG --out DIR [--logs FOLDER] [--dry-run] [arguments of `prefixmem train`]
#   TPU_NAME=NAME ZONE=ZONE [PROJECT=ID] launch/tpu_vm.sh --tail            shows what all workers write
#   TPU_NAME=NAME ZONE=ZONE [PROJECT=ID] launch/tpu_vm.sh --logs FOLDER     fetches what they wrote
# CONFIG is a path within this repository, or a name such as recommend/base; DIR is gs://BUCKET/RUN, or
# a folder that all workers share (the data that the config names likewise). Workers need Python 3.11 to 3.13. What is
# committed (HEAD) is copied, not edits beside it. The repository is copied to every worker, installed
# there with the TPU build of JAX, and `prefixmem train CONFIG --distributed ...` is started on
# all of them. What they write is shown, and kept in a file on each; --logs fetches these when the
# training ends, however it does, into FOLDER/worker-I.log. LIBTPU_INIT_ARGS and
# JAX_COMPILATION_CACHE_DIR are set on the workers as they are here; where the latter is not, compiled
# programs are kept in gs://BUCKET/programs.
# --dry-run prints exactly the commands that would run, and runs none.
set -euo pipefail
usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ $# -ge 1 ] || usage 2
case "$1" in -h|--help) usage 0 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
dry_run=no
follow=no
logs=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=yes; shift ;;
    --tail) follow=yes; shift ;;
    --logs)
      [ -n "${2:-}" ] || { echo "tpu_vm.sh: --logs: expected a folder" >&2; exit 2; }
      logs=$2; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
for name in TPU_NAME ZONE; do
  [ -n "${!name:-}" ] || { echo "tpu_vm.sh: set $name (see --help)" >&2; exit 2; }
done
where=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project "$PROJECT")
vm=(gcloud compute tpus tpu-vm)
log=prefixmem_jax/train.log # on each worker
run() { if [ "$dry_run" = yes ]; then show "$@"; else "$@"; fi; }
on_all() { run "${vm[@]}" ssh "$TPU_NAME" "${where[@]}" --worker=all --command "$1"; }
collect() {
  local describe=("${vm[@]}" describe "$TPU_NAME" "${where[@]}" "--format=value(networkEndpoints.len())")
  local worker workers=I status=0
  run mkdir -p "$logs"
  if [ "$dry_run" = yes ]; then
    show "${describe[@]}"
    echo "# and for each of so many workers, I from 0:"
  else
    workers=$("${describe[@]}") && workers=$(seq 0 $((workers - 1))) || return 1
  fi
  for worker in $workers; do
    run "${vm[@]}" scp "$TPU_NAME:$log" "$logs/worker-$worker.log" "${where[@]}" "--worker=$worker" || status=1
  done
  return "$status"
}

if [ ${#arguments[@]} -eq 0 ]; then
  [ "$follow" = no ] || on_all "tail -n 20 -F $log"
  [ -z "$logs" ] || collect
  exit 0
fi
config=${arguments[0]}
[ -f "$root/$config" ] || [ -f "$root/configs/$config.py" ] || { echo "tpu_vm.sh: $config: no such file or config in the repository" >&2; exit 2; }
[ "$follow" = no ] || { echo "tpu_vm.sh: --tail stands alone: what is started is shown anyhow" >&2; exit 2; }
case " ${arguments[*]} " in *" --out "*) ;; *) echo "tpu_vm.sh: --out is needed: gs://BUCKET/RUN, or a folder that all workers share" >&2; exit 2 ;; esac
archive=$(mktemp -u "${TMPDIR:-/tmp}/prefixmem_jax.XXXXXX").tar.gz
[ "$dry_run" = no ] || archive=/tmp/prefixmem_jax.tar.gz
started=no
finish() {
  local status=$?
  rm -f "$archive"
  if [ "$started" = yes ] && [ -n "$logs" ]; then
    collect || echo "tpu_vm.sh: not all logs could be fetched" >&2
  fi
  exit "$status"
}
trap finish EXIT
tpu_environment "${arguments[@]}"
train=$(show env ${environment[@]+"${environment[@]}"} .venv/bin/prefixmem train "$config" --distributed "${arguments[@]:1}")
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run "${vm[@]}" scp "$archive" "$TPU_NAME:prefixmem_jax.tar.gz" "${where[@]}" --worker=all
on_all "mkdir -p prefixmem_jax && tar -xzf prefixmem_jax.tar.gz -C prefixmem_jax && cd prefixmem_jax && root=\$PWD && . launch/common.sh && set_up .venv tpu gcs"
started=yes
on_all "set -o pipefail && cd prefixmem_jax && $train 2>&1 | tee -a train.log"
