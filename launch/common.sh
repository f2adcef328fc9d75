# Sourced by the other scripts: a virtual environment with this repository in it.

# set_up VENV EXTRA...: makes the environment VENV with Python 3.11 or newer (or uses it) and installs
# the package there.
set_up() {
  local venv=$root/$1
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
