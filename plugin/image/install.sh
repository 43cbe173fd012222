#!/bin/sh
# Installs a built plugin into this machine's own Docker, and replaces an older one.
#
#   install.sh PLUGIN_DIRECTORY NAME
set -eu

plugin=${1:?usage: install.sh PLUGIN_DIRECTORY NAME}
name=${2:?usage: install.sh PLUGIN_DIRECTORY NAME}

if ! docker version >/dev/null 2>&1; then
    echo "no Docker engine answers on this machine; start it, then try again" >&2
    exit 1
fi
if docker plugin inspect "$name" >/dev/null 2>&1; then
    # Without a registry there is no upgrade in place. The kernel carries the packets of containers
    # meanwhile, and the new plugin recovers its state from Docker and the kernel.
    echo "replacing the installed plugin"
    docker plugin disable -f "$name" >/dev/null 2>&1 || true
    docker plugin rm -f "$name" >/dev/null
fi
docker plugin create "$name" "$plugin"
docker plugin enable "$name"
echo "installed; for example: docker network create -d $name --attachable n"
