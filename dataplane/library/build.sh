#!/bin/sh
# Builds the library that containers preload: one file for glibc from 2.17 on and for musl.
#
#   build.sh OUTPUT [SANITIZER]      SANITIZER: address,undefined or thread, for tests on this machine
#
# It is linked against no C library. What it needs of one it names without a version, and both C libraries have; dlsym is in
# libdl.so.2 before glibc 2.34, and musl takes that name for itself.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [SANITIZER]}
sanitizer=${2:-}
compiler=${CC:-gcc}

# What it is, for `freeflow doctor`: the same sources with the same compiler are the same library.
build=$({ "$compiler" --version; cat "$here"/*.c "$here"/*.h "$0"; } | sha256sum | cut -c1-20)

set -- -std=gnu11 -O2 -g -D_GNU_SOURCE "-DFREEFLOW_BUILD=\"$build\"" -fPIC -shared -fvisibility=hidden \
    -ftls-model=initial-exec -fno-strict-aliasing -fno-stack-protector \
    -Wall -Wextra -Wshadow -Werror -Wl,-z,noexecstack -Wl,-z,relro -Wl,-z,now
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
mkdir -p "$(dirname "$output")"
# shellcheck disable=SC2086
"$compiler" "$@" "$here"/*.c -Wl,--no-as-needed -l:libdl.so.2 -o "$output.new"
mv "$output.new" "$output"
