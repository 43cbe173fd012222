#!/bin/sh
# Builds freeflow-runc, the OCI runtime that gives containers the library. It is static, because it runs
# on the host, whose libraries are unknown.
#
#   build.sh OUTPUT [SANITIZER]      SANITIZER: address,undefined, for tests on this machine
#
# FREEFLOW_TEST=1: paths of the host start with the variable FREEFLOW_TEST_ROOT. With a sanitizer that
# is always so.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [SANITIZER]}
sanitizer=${2:-}
compiler=${CC:-gcc}

set -- -std=gnu11 -O2 -g -D_GNU_SOURCE -fno-strict-aliasing -Wall -Wextra -Wshadow -Werror -Wl,-z,noexecstack
if [ -n "$sanitizer" ]; then
    FREEFLOW_TEST=1
    set -- "$@" "-fsanitize=$sanitizer" -fno-sanitize-recover=all -fno-omit-frame-pointer
else
    set -- "$@" -static -fstack-protector-strong -D_FORTIFY_SOURCE=2
fi
[ -z "${FREEFLOW_TEST:-}" ] || set -- "$@" -DFREEFLOW_TEST
mkdir -p "$(dirname "$output")"
"$compiler" "$@" "$here"/*.c -l:libjson-c.a -o "$output.new"
[ -n "$sanitizer" ] || strip --strip-debug "$output.new"
mv "$output.new" "$output"
