#!/bin/sh
# Makes this checkout runnable on Debian 12: packages, .venv, the project in it, the BPF object.
# Idempotent; each step looks for its own result first. `setup.sh test`: also what only tests use.
set -eu
cd "$(dirname "$0")/.."
for_tests=
[ "${1:-}" != test ] || for_tests="bpftool nftables podman containerd runc containernetworking-plugins busybox-static iptables"

say() { echo "setup: $*"; }

packages() {
    clang=clang-19
    for found in clang-19 clang-18 clang-17 clang-16 clang-15 clang-14 clang; do
        if command -v "$found" >/dev/null; then clang=; break; fi
    done
    wanted="$clang libbpf1 libbpf-dev linux-libc-dev iproute2 procps util-linux ca-certificates $for_tests"
    command -v etcd >/dev/null || wanted="$wanted etcd-server"
    /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || wanted="$wanted python3 python3-venv"
    missing=
    for package in $wanted; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "setup: packages are missing and installing them needs root:$missing" >&2
        exit 1
    fi
    say "installing$missing"
    scripts/apt-install.sh $missing
}

# The hash of what an installation was made from, kept beside it: a stamp that no clock can fool.
stamped() {
    stamp=".venv/.$1"
    shift
    hash=$(cat "$@" | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]
}

virtualenv() {
    [ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
    if ! stamped lock requirements.lock; then
        say "installing what requirements.lock names into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
        echo "$hash" >"$stamp"
    fi
    if ! stamped project pyproject.toml proto/hatch_build.py; then
        say "installing the project into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --no-deps --no-build-isolation -e .
        echo "$hash" >"$stamp"
    fi
    .venv/bin/python proto/hatch_build.py
}

datapath() {
    object=datapath/bpf/tessera.o
    if [ -f "$object" ] && [ -z "$(find datapath/bpf -name '*.[ch]' -newer "$object")" ]; then
        return 0
    fi
    say "compiling the BPF programs"
    datapath/bpf/build.sh
}

packages
virtualenv
datapath
[ "${1:-}" != test ] || scripts/cnitool.sh || say "no cnitool; the tests that need it are skipped"
