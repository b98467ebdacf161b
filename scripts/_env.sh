# Sourced by the scripts beside it (bash): finds Python, makes the virtual environment, installs kizu into it.
#
#   kizu_setup NAME EXTRAS [GROUP]   sets KIZU_PYTHON; installs only when something changed since the last time; compiles
#   kizu_need_broker                 makes sure of mosquitto and its clients
#   kizu_want_rtsp_server            tries to have GStreamer's RTSP server; its tests say so where it is missing
#   kizu_want_sparkplug_host         tries to have Node.js and the packages of the tests' Sparkplug host; they say so too
#
# The environment is $KIZU_VENV, else an activated one, else .venv in the checkout.
# shellcheck shell=bash

KIZU_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
KIZU_TORCH=2.13.0

kizu_say() { printf 'kizu: %s\n' "$*" >&2; }

kizu_die() {
  kizu_say "$*"
  exit 3
}

# Installs Debian packages as root or through sudo; fails where neither is possible.
kizu_apt() {
  command -v apt-get >/dev/null || return 1
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
    root=(sudo -n)
  fi
  kizu_say "installing $* (apt-get)"
  "${root[@]}" apt-get update -qq >&2 || true
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" </dev/null >&2
}

# Prints the first Python of 3.10 or later.
kizu_find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

kizu_make_venv() {
  local python
  [ -x "$1/bin/python" ] && return
  python=$(kizu_find_python) || kizu_die "no Python 3.10 or later found; install python3"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    kizu_apt python3-venv || kizu_die "this Python has no venv module; run: apt-get install python3-venv"
  fi
  kizu_say "making $1 with $("$python" --version)"
  "$python" -m venv "$1" || kizu_die "cannot make a virtual environment in $1"
}

# What an installation depends on; its hash is the stamp.
kizu_fingerprint() {
  {
    cat "$KIZU_ROOT/pyproject.toml" "$KIZU_ROOT/constraints.txt"
    # What the build compiles: an editable installation keeps what it was installed with.
    cat "$KIZU_ROOT/hatch_build.py" "$KIZU_ROOT"/agent/kizu_agent/sparkplug/*.proto
    "$KIZU_PYTHON" -c 'import sys; print(sys.version, sys.prefix)'
    printf '%s\n' "$KIZU_ROOT" "$KIZU_TORCH" "$@"
  } | sha256sum
}

kizu_pip() { "$KIZU_PYTHON" -m pip install --quiet --disable-pip-version-check "$@" </dev/null; }

kizu_install() {
  local extras=$1 group=${2:-}
  # Dependency groups came with pip 25.1.
  kizu_pip --upgrade 'pip>=25.1' || return
  kizu_say "installing torch $KIZU_TORCH"
  kizu_pip --constraint "$KIZU_ROOT/constraints.txt" "torch==$KIZU_TORCH" || return
  kizu_say "installing kizu[$extras]${group:+ and the group $group}"
  (cd "$KIZU_ROOT" && kizu_pip --constraint constraints.txt --editable ".[$extras]" ${group:+--group "$group"})
}

kizu_setup() {
  local name=$1 venv stamp wanted
  shift
  venv=${KIZU_VENV:-${VIRTUAL_ENV:-$KIZU_ROOT/.venv}}
  kizu_make_venv "$venv"
  KIZU_PYTHON=$venv/bin/python
  stamp=$venv/.kizu-$name
  wanted=$(kizu_fingerprint "$@")
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then kizu_install_once "$stamp" "$wanted" "$@"; fi
  # pip compiles what it installs, but not what it only links to: with PYTHONDONTWRITEBYTECODE each start would do it anew.
  (cd "$KIZU_ROOT" && "$KIZU_PYTHON" -m compileall -q agent contract train export) >/dev/null || true
}

kizu_install_once() {
  local stamp=$1 wanted=$2
  shift 2
  # Two scripts started at once must not install into each other.
  exec 9>"$(dirname -- "$stamp")/.kizu-lock"
  if command -v flock >/dev/null; then flock 9; fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    kizu_install "$@" || kizu_die "the installation failed; see above, mend it and start again"
    printf '%s\n' "$wanted" >"$stamp"
  fi
  exec 9>&-
}

kizu_need_broker() {
  PATH=$PATH:/usr/sbin:/usr/local/sbin
  command -v mosquitto >/dev/null && command -v mosquitto_sub >/dev/null && return
  kizu_apt mosquitto mosquitto-clients ||
    kizu_die "the tests need a real broker; run: apt-get install mosquitto mosquitto-clients"
}

kizu_want_rtsp_server() {
  local packages=(python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,bad})
  /usr/bin/python3 -c 'import gi; gi.require_version("GstRtspServer", "1.0")' 2>/dev/null && return
  kizu_apt --no-install-recommends "${packages[@]}" ||
    kizu_say "the tests of network cameras will fail without an RTSP server; run: apt-get install ${packages[*]}"
}

kizu_want_sparkplug_host() {
  local folder=$KIZU_ROOT/tests/sparkplug/host
  if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    kizu_apt --no-install-recommends nodejs npm ||
      { kizu_say "the Sparkplug tests will fail without Node.js and npm; run: apt-get install nodejs npm"; return 0; }
  fi
  # npm writes this file last, so it is older than the lock file where that has changed since.
  [ "$folder/node_modules/.package-lock.json" -nt "$folder/package-lock.json" ] && return
  kizu_say "installing the Sparkplug tests' host (npm)"
  (cd "$folder" && npm ci --silent --ignore-scripts --no-audit --no-fund </dev/null >&2) ||
    kizu_say "the Sparkplug tests will fail: npm ci in $folder did not succeed"
}
