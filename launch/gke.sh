#!/usr/bin/env bash
# Trains one config on TPU slices of a GKE cluster, as a JobSet.
#   NAME=run IMAGE=REGISTRY/prefixmem ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 [SLICES=1] \
#     launch/gke.sh CONFIG --out gs://BUCKET/RUN [--dry-run] [arguments of `prefixmem train`]
# IMAGE is made by launch/Dockerfile; HOSTS a slice's machines, CHIPS of one of them. Where a slice fails or
# is taken away, all start again (100 times at most), and the run goes on from what was saved. --dry-run
# prints the JobSet that would be created. LIBTPU_INIT_ARGS and JAX_COMPILATION_CACHE_DIR are set there as
# they are here; where the latter is not, compiled programs are kept in gs://BUCKET/programs. The cluster
# needs the JobSet controller (clusters made by xpk have it).
set -euo pipefail
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ $# -ge 1 ] || usage 2
case "$1" in -h|--help) usage 0 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
dry_run=no
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
done
for setting in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS; do
  [ -n "${!setting:-}" ] || { echo "gke.sh: set $setting (see --help)" >&2; exit 2; }
done
case " ${arguments[*]} " in *" --out gs://"*) ;; *) echo "gke.sh: --out gs://BUCKET/RUN is needed: machines share no disk" >&2; exit 2 ;; esac
quoted() { # a YAML string
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
command=""
for word in train "${arguments[@]}" --distributed; do command+="${command:+, }$(quoted "$word")"; done
tpu_environment "${arguments[@]}"
variables=""
for variable in ${environment[@]+"${environment[@]}"}; do
  variables+="
              - name: ${variable%%=*}
                value: $(quoted "${variable#*=}")"
done
jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quoted "$NAME")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(quoted "$ACCELERATOR")
              cloud.google.com/gke-tpu-topology: $(quoted "$TOPOLOGY")
            containers:
            - name: train
              image: $(quoted "$IMAGE")
              args: [$command]
              env:$variables
              resources:
                limits:
                  google.com/tpu: $CHIPS"
if [ "$dry_run" = yes ]; then echo "$jobset"; else kubectl create -f - <<<"$jobset"; fi
