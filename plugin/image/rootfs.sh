#!/bin/sh
# Makes the plugin (config.json and rootfs/) in a directory, from the Debian archive alone. Needs root,
# and no Docker.
#
#   rootfs.sh OUTPUT
#       FREEFLOW_CACHE   the directory for base systems (default /var/cache/freeflow)
#
# The base system is made once per list of packages. FreeFlow's code is then copied into it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
output=${1:?usage: rootfs.sh OUTPUT}
cache=${FREEFLOW_CACHE:-/var/cache/freeflow}
suite=trixie

# Comments are no part of the recipe.
key=$(cat "$here/packages.txt" "$0" "$here/bootstrap.sh" | sed '/^ *#/d' | sha256sum | cut -c1-16)
base="$cache/plugin-$suite-$key.tar"

if [ ! -e "$base" ]; then
    mkdir -p "$cache"
    echo "making the base system from the Debian archive ($suite)"
    packages=$(tr '\n' ',' <"$here/packages.txt" | sed 's/,$//')
    # mmdebstrap expands its hooks itself.
    # shellcheck disable=SC2016
    FREEFLOW_CACHE=$cache "$here/bootstrap.sh" "$suite" "$packages" "$base" \
        --customize-hook='rm -rf "$1"/var/log "$1"/tmp/* "$1"/var/lib/dpkg/*-old' \
        --customize-hook='mkdir -p "$1"/var/log "$1"/host/run "$1"/host/bin "$1"/host/dev "$1"/host/swarm "$1"/state "$1"/run/docker/plugins'
fi

rm -rf "$output"
mkdir -p "$output/rootfs"
tar -C "$output/rootfs" --exclude='./dev/*' -xf "$base"
"$here/install-code.sh" "$top" "$output/rootfs"
"$here/build-dataplane.sh" "$output/rootfs/usr/lib/freeflow"
cp "$top/config.json" "$output/config.json"
