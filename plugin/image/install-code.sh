#!/bin/sh
# Copies FreeFlow's code from a checkout into a root file system and compiles it there.
#
#   install-code.sh CHECKOUT ROOT
set -eu

top=${1:?usage: install-code.sh CHECKOUT ROOT}
root=${2:?usage: install-code.sh CHECKOUT ROOT}
target="$root/usr/lib/python3/dist-packages"

for package in plugin driver dataplane; do
    rm -rf "${target:?}/$package"
    mkdir -p "$target/$package"
    (cd "$top/$package" && find . -name '*.py' -o -name '*.json' -o -path './page/*' -type f) |
        (cd "$top/$package" && tar -cf - -T -) | tar -xf - -C "$target/$package"
done
find "$target/plugin" "$target/driver" "$target/dataplane" -name __pycache__ -prune -exec rm -rf {} +
# Hash-based and unchecked: the file system's times do not matter, and nothing is compiled at start.
compile="-m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3/dist-packages"
if [ "$root" = / ] || [ -z "$root" ]; then
    # shellcheck disable=SC2086
    python3 $compile
else
    # shellcheck disable=SC2086
    chroot "$root" python3 $compile
fi
