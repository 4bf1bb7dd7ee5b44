#!/usr/bin/env bash
# Makes a virtual environment and installs topfive into it:   scripts/environment.sh VENV REQUIREMENT...
#
# On Debian and Ubuntu, what the system lacks (the venv module, curl) is installed with apt, after saying so. Versions
# are those of constraints.txt. Where pip looks for packages is pip's own configuration: for PyTorch's CPU-only build
# on a machine without a GPU, point PIP_EXTRA_INDEX_URL at it (see README.md).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m%s\033[0m\n' "topfive: $*" >&2; }
fail() { say "$*"; exit 1; }

# Installs Debian packages, or says what to run.
apt_install() {
  command -v apt-get >/dev/null || fail "please install $* (this is no Debian or Ubuntu, so this script does not know how)."
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "please run, as root: apt-get install $*"
    # Without a terminal nobody could type a password.
    if [ -t 0 ]; then as_root=(sudo); else as_root=(sudo -n); fi
  fi
  say "installing $* with apt"
  "${as_root[@]}" apt-get update -q >&2 || say "apt-get update failed; going on with the package lists at hand."
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@" >&2 \
    || fail "apt could not install $*; the reason is above. Please install by hand and run this again."
}

# Prints the first Python that is new enough: $PYTHON if set, else 3.11, 3.12, 3.13, or whatever python3 is.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

[ $# -ge 2 ] || fail "usage: scripts/environment.sh VENV REQUIREMENT..."
venv=$1
shift

if [ ! -x "$venv/bin/python" ]; then
  if ! python=$(find_python); then
    [ -z "${PYTHON:-}" ] || fail "PYTHON is $PYTHON, which is not Python 3.11 or newer."
    apt_install python3 python3-venv
    python=$(find_python) || fail "this system's python3 is older than 3.11; install 3.11, 3.12 or 3.13 and set PYTHON=/path/to/it."
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  fi
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
command -v curl >/dev/null || apt_install curl

say "installing $* into $venv (the first time this downloads half a gigabyte; several with a CUDA build of PyTorch)"
# By environment, so that they hold for the build backend too (its own variable since pip 25.3).
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install "$@" \
  || fail "pip could not install $*; the reason is above. Once mended, the same command goes on from here."
