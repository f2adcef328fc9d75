# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with this repository in it, and what they share.

# set_up VENV EXTRA...: makes the environment VENV with Python 3.11 or newer (or uses it) and installs
# the package there.
set_up() {
  local venv=${root:?}/$1
  shift
  local python="" candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "set-up: no Python 3.11 to 3.13 found; install one or set PYTHON=/path/to/python" >&2
    return 1
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  local extras=""
  [ $# -gt 0 ] && extras="[$(IFS=,; echo "$*")]"
  echo "set-up: installing prefixmem_jax$extras into $venv"
  "$venv/bin/python" -m pip install --quiet --editable "$root$extras"
}

# show WORD...: prints a command as it would be typed.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# tpu_environment ARGUMENT...: sets `environment` to the variables with which `prefixmem train ARGUMENT...`
# starts on TPUs: the compiler's flags where LIBTPU_INIT_ARGS is set, and where --out is in a bucket, a folder
# for compiled programs beside it, which outlives the machines. Yours stand where they are set.
tpu_environment() {
  local out="" cache=""
  while [ $# -gt 0 ]; do
    [ "$1" != --out ] || out=${2%/}
    shift
  done
  case "$out" in gs://*/*) cache=${out%/*}/programs ;; esac
  cache=${JAX_COMPILATION_CACHE_DIR-$cache}
  environment=()
  [ -z "${LIBTPU_INIT_ARGS+set}" ] || environment+=("LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS")
  [ -z "$cache" ] || environment+=("JAX_COMPILATION_CACHE_DIR=$cache")
}
