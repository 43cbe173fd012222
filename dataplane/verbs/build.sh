#!/bin/sh
# Builds the libibverbs that containers preload, libibverbs.so.1, and beside it its companion libibverbs.so.
#
#   build.sh OUTPUT [SANITIZER]      SANITIZER: address,undefined or thread, for tests on this machine
#
# Like libfreeflow.so both are linked against no C library, and name what they need of one without a version. Programs that load
# "libibverbs.so" by that name get the companion instead of their own, and find the symbols in the library that it depends on.
# musl looks for that one by its path, though it is loaded already. The companion wraps calls of the C library: virtual.h.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [SANITIZER]}
sanitizer=${2:-}
compiler=${CC:-gcc}
folder=$(dirname "$output")
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

mkdir -p "$folder"
python3 "$here/symbols.py" "$made"
set -- -std=gnu11 -O2 -g -D_GNU_SOURCE -fPIC -shared -fvisibility=hidden -ftls-model=initial-exec \
    -fno-strict-aliasing -fno-stack-protector -Wall -Wextra -Wshadow -Werror \
    -Wl,-z,noexecstack -Wl,-z,relro -Wl,-z,now
case $("$compiler" -dumpmachine) in
# By default atomics are calls of libgcc there, which isn't linked.
aarch64*) set -- "$@" -mno-outline-atomics ;;
esac
if [ -n "$sanitizer" ]; then
    # ThreadSanitizer knows no fences: what they order it may report all the same.
    set -- "$@" "-fsanitize=$sanitizer" -fno-omit-frame-pointer -Wno-tsan
else
    set -- "$@" -nostdlib
fi
# The stubs have no prototypes that fit: their callers pass arguments that they don't read.
"$compiler" "$@" -fvisibility=default -c "$made/stubs.c" -o "$made/stubs.o" -r
"$compiler" "$@" "$here"/*.c "$made/stubs.o" -Wl,-soname,libibverbs.so.1 \
    -Wl,--version-script="$made/symbols.map" -o "$output.new"
mv "$output.new" "$output"
# shellcheck disable=SC2016
"$compiler" "$@" -fno-sanitize=all "$here"/companion/*.c -nostdlib -Wl,-soname,libibverbs.so -Wl,--no-as-needed "$output" \
    -Wl,--enable-new-dtags -Wl,-rpath,'$ORIGIN' -o "$folder/libibverbs.so.new"
mv "$folder/libibverbs.so.new" "$folder/libibverbs.so"
