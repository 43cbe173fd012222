#!/bin/sh
# Makes the plugin (config.json and rootfs/) in a directory, from the Debian archive alone; needs root, and no Docker.
#
#   rootfs.sh OUTPUT        BASE_CACHE: where base systems are kept (default /var/cache/freeflow)
#
# The base system is made once per list of packages; what changes with the code is copied over it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
output=${1:?usage: rootfs.sh OUTPUT}
cache=${BASE_CACHE:-/var/cache/freeflow}
suite=trixie
mirror=$("$here/mirror.sh")

key=$(cat "$here/packages.txt" "$0" | sha256sum | cut -c1-16)
base="$cache/plugin-$suite-$key.tar"

if [ ! -e "$base" ]; then
    mkdir -p "$cache"
    echo "making the base system from the Debian archive ($suite)"
    packages=$(tr '\n' ',' <"$here/packages.txt" | sed 's/,$//')
    temporary="$base.$$.tar"
    # Documentation, locales and caches are no use in a plugin. mmdebstrap expands its hooks itself.
    # shellcheck disable=SC2016
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists "$1"/var/cache/apt "$1"/var/log "$1"/tmp/* "$1"/var/lib/dpkg/*-old' \
        --customize-hook='mkdir -p "$1"/var/log "$1"/host/run "$1"/host/bin "$1"/host/dev "$1"/host/swarm "$1"/state "$1"/run/docker/plugins' \
        "$suite" "$temporary" "$mirror"
    mv "$temporary" "$base"
fi

rm -rf "$output"
mkdir -p "$output/rootfs"
tar -C "$output/rootfs" --exclude='./dev/*' -xf "$base"
"$here/install-code.sh" "$top" "$output/rootfs"
"$top/dataplane/library/build.sh" "$output/rootfs/usr/lib/freeflow/libfreeflow.so"
"$top/dataplane/relay/build.sh" "$output/rootfs/usr/lib/freeflow/freeflow-relay"
"$top/dataplane/ebpf/build.sh" "$output/rootfs/usr/lib/freeflow/overlay.bpf.o"
cp "$top/config.json" "$output/config.json"
