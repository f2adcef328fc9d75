#!/usr/bin/env bash
# Trains a config, or evaluates runs, or recommends to all users of a file, in N real processes on this
# machine, which find each other over loopback.
#   launch/local.sh CONFIG --processes N [arguments of `prefixmem train`]
#   launch/local.sh evaluate RUN ... --processes N [arguments of `prefixmem evaluate`]
#   launch/local.sh recommend RUN --histories FILE --out FILE --processes N [arguments of `prefixmem recommend`]
# The first process's output is shown; the others write to LOGS/process-I.log (LOGS: a new
# temporary folder, printed). If one fails, all are stopped. Told to end (SIGTERM), or if one of them
# is, a training saves its state and all end with status 143. Needs `prefixmem` on the PATH.
set -euo pipefail
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit "$1"; }
verb=train
case "${1:-}" in -h|--help) usage 0 ;; train|evaluate|recommend) verb=$1; shift ;; esac
[ $# -ge 1 ] || usage 2
what=$1; shift
processes=1
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --processes)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "local.sh: --processes: expected a number from 1, got '${2:-}'" >&2; exit 2; }
      processes=$2; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
command -v prefixmem >/dev/null || { echo "local.sh: no 'prefixmem' on the PATH; activate the environment it is installed in" >&2; exit 2; }
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
logs=$(mktemp -d "${TMPDIR:-/tmp}/prefixmem.XXXXXX")
export PREFIXMEM_COORDINATOR=127.0.0.1:$port PREFIXMEM_PROCESSES=$processes
pids=()
stop_all() { for pid in "${pids[@]}"; do kill "${1:--TERM}" "$pid" 2>/dev/null || true; done; }
trap stop_all EXIT
trap 'exit 130' INT
trap stop_all TERM
for ((i = processes - 1; i >= 0; i--)); do
  run=(prefixmem "$verb" "$what" "${arguments[@]}" --distributed)
  if [ "$i" -gt 0 ]; then
    PREFIXMEM_PROCESS_ID=$i "${run[@]}" >"$logs/process-$i.log" 2>&1 &
  else
    PREFIXMEM_PROCESS_ID=$i "${run[@]}" &
  fi
  pids+=($!)
done
[ "$processes" -eq 1 ] || echo "local.sh: $processes processes; logs of the others in $logs" >&2
told=0
while :; do
  status=0
  wait -n || status=$?
  case $status in
    0) ;;
    127) exit "$told" ;; # none is left
    143) told=143 ;;
    *)
      echo "local.sh: a process failed with status $status; stopping the others (logs: $logs)" >&2
      stop_all -KILL # told to end they would wait for the one that is gone, and keep the run's lock
      wait
      exit "$status" ;;
  esac
done
