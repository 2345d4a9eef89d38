#!/bin/sh
# Installs Debian packages without letting any of them start a service: etcd-server would run an
# etcd of its own, now and at every boot, on ports that are none of our business.
set -eu
policy=/usr/sbin/policy-rc.d
had_etcd=$(dpkg-query -W -f '${db:Status-Status}' etcd-server 2>/dev/null || true)
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "$@" >/dev/null
if [ "$had_etcd" != installed ] && [ -f /lib/systemd/system/etcd.service ]; then
    deb-systemd-helper disable etcd.service >/dev/null 2>&1 || true
    update-rc.d etcd disable >/dev/null 2>&1 || true
fi
