#!/bin/sh
# Makes the plugin (config.json and rootfs/) in a directory by `docker build`, from a public Debian
# image.
#
#   from-docker.sh OUTPUT       BASE: the image (default debian:trixie-slim)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
output=${1:?usage: from-docker.sh OUTPUT}
tag=freeflow-rootfs:build

docker build --build-arg "BASE=${BASE:-debian:trixie-slim}" --tag "$tag" "$top"
container=$(docker create "$tag" true)
trap 'docker rm "$container" >/dev/null' EXIT
rm -rf "$output"
mkdir -p "$output/rootfs"
docker export "$container" | tar -C "$output/rootfs" --exclude='dev/*' -xf -
"$here/build-dataplane.sh" "$output/rootfs/usr/lib/freeflow"
cp "$top/config.json" "$output/config.json"
