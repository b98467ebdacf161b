#!/bin/sh
# Install the kizu agent as a service, or remove it. POSIX sh; run as root, or with --prefix as anybody.
set -eu

usage() {
    cat <<'END'
Usage: install.sh [--wheel FILE] [--gpu | --openvino] [--prefix DIR] [--dry-run]
       install.sh --uninstall [--purge] [--prefix DIR] [--dry-run]

  --wheel FILE  the kizu wheel; by default the newest one in dist/ of this checkout
  --gpu         install onnxruntime for NVIDIA GPUs instead of that for CPUs
  --openvino    … with OpenVINO, for Intel processors
  --prefix DIR  install below DIR and leave users and services alone
  --dry-run     print every step and change nothing
  --uninstall   remove programs and service; configuration and state stay
  --purge       … and remove them too, with the user

PYTHON names the interpreter to use (default: python3; 3.10 or later).
END
}

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}

is_dry=no is_uninstall=no is_purge=no prefix='' wheel='' extra=cpu
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) is_dry=yes ;;
        --uninstall) is_uninstall=yes ;;
        --purge) is_purge=yes ;;
        --gpu) extra=gpu ;;
        --openvino) extra=openvino ;;
        --prefix | --wheel)
            [ $# -gt 1 ] || fail "$1 needs a value" 2
            case $1 in
                --prefix) prefix=$2 ;;
                --wheel) wheel=$2 ;;
            esac
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown option $1" 2 ;;
    esac
    shift
done
[ $is_purge = no ] || [ $is_uninstall = yes ] || fail "--purge goes with --uninstall" 2

here=$(cd "$(dirname "$0")" && pwd)
case $prefix in
    '' | /*) ;;
    *) prefix=$(pwd)/$prefix ;;
esac
prefix=${prefix%/}
case $prefix in
    *[!A-Za-z0-9_./+-]*) fail "--prefix may hold letters, digits and _ . / + - only" 2 ;;
esac
programs=$prefix/opt/kizu
config=$prefix/etc/kizu
state=$prefix/var/lib/kizu
units=$prefix/etc/systemd/system
python=${PYTHON:-python3}

# Print the step; run it unless this is a dry run.
step() {
    printf '+'
    printf ' %s' "$@"
    printf '\n'
    [ $is_dry = yes ] || "$@"
}

on_system() { [ -z "$prefix" ]; }
has_systemd() { on_system && [ -d /run/systemd/system ]; }

# Copy $1 to $2 with mode $3, its absolute paths below the prefix.
place() {
    echo "+ write $2 (mode $3) from $1"
    [ $is_dry = no ] || return 0
    sed -e "s|/opt/kizu|$programs|g" -e "s|/etc/kizu|$config|g" -e "s|/var/lib/kizu|$state|g" "$1" >"$2.new"
    chmod "$3" "$2.new"
    mv "$2.new" "$2"
}

make_user() {
    on_system || return 0
    getent group kizu >/dev/null || step groupadd --system kizu
    getent passwd kizu >/dev/null ||
        step useradd --system --gid kizu --home-dir /var/lib/kizu --no-create-home --shell /usr/sbin/nologin kizu
    for group in video render; do
        if getent group "$group" >/dev/null; then step usermod --append --groups "$group" kizu; fi
    done
}

find_wheel() {
    if [ -z "$wheel" ]; then
        # Names of wheels hold no spaces or newlines, so the newest one can be taken from ls.
        # shellcheck disable=SC2012
        wheel=$(ls -t "$here"/../dist/kizu-*.whl 2>/dev/null | head -n 1)
        [ -n "$wheel" ] || fail "no wheel: name it with --wheel FILE, or make one with: python -m build --wheel" 2
    fi
    [ -f "$wheel" ] || fail "$wheel: there is no such file" 2
    wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
}

check_python() {
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$python must be Python 3.10 or later with venv (Debian, Ubuntu: apt install python3-venv); PYTHON names another"
}

install_programs() {
    step mkdir -p "$programs"
    [ -x "$programs/venv/bin/python" ] || step "$python" -m venv "$programs/venv"
    set -- --disable-pip-version-check --quiet
    if [ -f "$here/../constraints.txt" ]; then set -- "$@" --constraint "$here/../constraints.txt"; fi
    # Packages of onnxruntime lie in the same folder: what another extra left there would be mixed with the new one.
    case $extra in
        cpu) others='onnxruntime-gpu onnxruntime-openvino' ;;
        gpu) others='onnxruntime onnxruntime-openvino' ;;
        openvino) others='onnxruntime onnxruntime-gpu' ;;
    esac
    # shellcheck disable=SC2086
    step "$programs/venv/bin/python" -m pip --disable-pip-version-check -qq uninstall --yes $others
    step "$programs/venv/bin/python" -m pip install "$@" --upgrade "$wheel[$extra]"
}

install_config() {
    step mkdir -p "$config/credentials"
    step chmod 0750 "$config" "$config/credentials"
    if on_system; then step chgrp kizu "$config"; fi
    if [ -e "$config/agent.toml" ]; then
        echo "= $config/agent.toml stays as it is"
    else
        place "$here/agent.example.toml" "$config/agent.toml" 0640
        if on_system; then step chgrp kizu "$config/agent.toml"; fi
    fi
    place "$here/agent.example.toml" "$config/agent.example.toml" 0644
}

# Members of the group kizu may drop models.
install_state() {
    step mkdir -p "$state/drop"
    if on_system; then step chown kizu:kizu "$state" "$state/drop"; fi
    step chmod 0750 "$state"
    step chmod 2770 "$state/drop"
}

install_service() {
    step mkdir -p "$units"
    place "$here/kizu-agent.service" "$units/kizu-agent.service" 0644
    has_systemd || return 0
    step systemctl daemon-reload
    step systemctl enable kizu-agent
    step systemctl try-restart kizu-agent
}

install_all() {
    find_wheel
    check_python
    make_user
    install_programs
    install_config
    install_state
    install_service
    cat <<END

Next:
  1. edit     $config/agent.toml
  2. check    $programs/venv/bin/kizu-agent check --config $config/agent.toml
  3. start    systemctl start kizu-agent
  4. a model  cp model.kizu $state/drop/
END
}

uninstall_all() {
    if has_systemd; then step systemctl disable --now kizu-agent || echo "= the service was not installed"; fi
    step rm -f "$units/kizu-agent.service"
    if has_systemd; then step systemctl daemon-reload; fi
    step rm -rf "$programs"
    if [ $is_purge = no ]; then
        echo "= $config and $state stay; remove them with --purge"
        return 0
    fi
    step rm -rf "$config" "$state"
    if on_system && getent passwd kizu >/dev/null; then step userdel kizu; fi
    if on_system && getent group kizu >/dev/null; then step groupdel kizu; fi
}

if on_system && [ $is_dry = no ] && [ "$(id -u)" -ne 0 ]; then
    fail "must run as root; or try --dry-run, or --prefix DIR"
fi
if [ $is_uninstall = yes ]; then uninstall_all; else install_all; fi
