#!/bin/sh
# Builds cnitool, CNI's own runtime for one attachment, from Debian's source package into .venv/bin.
# Only tests use it; without it they say so. Debian has no binary package of it.
set -eu
cd "$(dirname "$0")/.."
tool=.venv/bin/cnitool
[ ! -x "$tool" ] || exit 0
source=golang-github-appc-cni
scripts/apt-install.sh golang-1.19-go "$source-dev"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Where the packages came from, their source is.
apt-cache policy "$source-dev" |
    awk '$2 ~ /^http/ { split($3, at, "/"); print "deb-src", $2, at[1], at[2]; exit }' >"$work/list"
mkdir -p "$work/lists/partial"
chmod 755 "$work"
set -- -qq -o "Dir::Etc::sourcelist=$work/list" -o Dir::Etc::sourceparts=/dev/null \
    -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root
apt-get "$@" update
(cd "$work" && apt-get "$@" source --download-only "$source" && tar -xf "$source"_*.orig.tar.*)
cd "$work/$source"-*/
GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE="$work/cache" CGO_ENABLED=0 \
    /usr/lib/go-1.19/bin/go build -o "$OLDPWD/$tool" ./cnitool
