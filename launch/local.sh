#!/usr/bin/env bash
# Trains a config, or evaluates runs, recommends to all users of a file, or exports, in N real processes
# on this machine, which find each other over loopback.
#   launch/local.sh CONFIG --processes N [--dry-run] [arguments of `prefixmem train`]
#   launch/local.sh evaluate RUN ... --processes N [arguments of `prefixmem evaluate`]
#   launch/local.sh recommend RUN --histories FILE --out FILE --processes N [arguments of `prefixmem recommend`]
#   launch/local.sh export RUN --out DIR --processes N [arguments of `prefixmem export`]
# The first process's output is shown; the others write to LOGS/process-I.log (LOGS: a new
# temporary folder, printed). If one fails, all are stopped, and one line says which it was and what it
# said last. Told to end (SIGTERM, or Ctrl-C), or if one of them is, a training saves its state and all
# end with status 143, or 130. --dry-run prints the commands that would run (PORT is a free one), and
# runs none. Needs bash 5.1, and `prefixmem` on the PATH.
set -euo pipefail
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit "$1"; }
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
verb=train
case "${1:-}" in -h|--help) usage 0 ;; train|evaluate|recommend|export) verb=$1; shift ;; esac
processes=1
dry_run=no
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --processes)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "local.sh: --processes: expected a number from 1, got '${2:-}'" >&2; exit 2; }
      processes=$2; shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
[ "${#arguments[@]}" -ge 1 ] || usage 2
port=PORT
logs=LOGS
if [ "$dry_run" = no ]; then
  command -v prefixmem >/dev/null || { echo "local.sh: no 'prefixmem' on the PATH; activate the environment it is installed in" >&2; exit 2; }
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  logs=$(mktemp -d "${TMPDIR:-/tmp}/prefixmem.XXXXXX")
fi
pids=()
stop_all() { for pid in "${pids[@]}"; do kill "${1:--TERM}" "$pid" 2>/dev/null || true; done; }
told=0 as=143 # what all end as where one is told to end
tell() {
  as=$1
  [ "$verb" = train ] || { stop_all -KILL; exit "$as"; } # JAX keeps SIGTERM for the training loop
  stop_all
}
trap stop_all EXIT
trap 'tell 130' INT
trap 'tell 143' TERM
for ((i = processes - 1; i >= 0; i--)); do
  run=(env "PREFIXMEM_COORDINATOR=127.0.0.1:$port" "PREFIXMEM_PROCESSES=$processes" "PREFIXMEM_PROCESS_ID=$i"
    prefixmem "$verb" "${arguments[@]}" --distributed)
  log=$logs/process-$i.log
  if [ "$dry_run" = yes ]; then
    if [ "$i" -gt 0 ]; then redirected=" >$log 2>&1"; else redirected=""; fi
    echo "$(show "${run[@]}")$redirected &"
  elif [ "$i" -gt 0 ]; then
    "${run[@]}" >"$log" 2>&1 &
    pids[i]=$!
  else
    "${run[@]}" &
    pids[i]=$!
  fi
done
[ "$dry_run" = no ] || exit 0
[ "$processes" -eq 1 ] || echo "local.sh: $processes processes; logs of the others in $logs" >&2

# said PROCESS: the last line of a process whose output is not shown.
said() {
  local log=$logs/process-$1.log
  [ ! -e "$log" ] || tail -c 4096 "$log" | tr '\r' '\n' | sed '/^[[:space:]]*$/d' | tail -n 1
}
while :; do
  status=0
  wait -n -p ended || status=$?
  case $status in
    0) continue ;;
    127) [ -n "${ended:-}" ] || exit "$told" ;; # none is left
    130) as=130 told=130; continue ;;
    143) told=$as; continue ;;
  esac
  for i in "${!pids[@]}"; do [ "${pids[i]}" != "$ended" ] || failed=$i; done
  why=$(said "$failed")
  echo "local.sh: process $failed failed with status $status; stopping the others (logs: $logs)${why:+. It said: $why}" >&2
  # It may have failed because another one is about to: that one waits for its peers before it ends.
  for i in "${!pids[@]}"; do
    other=$(said "$i")
    case "$other" in "$why") ;; "prefixmem: "*) echo "local.sh: process $i said: $other" >&2 ;; esac
  done
  exec 2>/dev/null # bash has a line of its own about each that is killed
  stop_all -KILL # told to end they would wait for the one that is gone, and keep the run's lock
  wait
  exit "$status"
done
