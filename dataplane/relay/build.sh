#!/bin/sh
# Builds the relay.
#
#   build.sh [--memory] OUTPUT [SANITIZER [FILE...]]
#
# --memory: with the transport `loopback`, for tests and measurements (FREEFLOW_MEMORY).
# SANITIZER: address,undefined or thread, for tests on this machine; empty: none.
# FILE: further sources, for tests; with them FREEFLOW_TEST is defined (tests/relay/faults.c), and
# FREEFLOW_MEMORY.
#
# The relay loads libibverbs when it opens a device, so only its headers are needed here, and a relay on a host
# without it says so.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
memory=
if [ "${1:-}" = --memory ]; then
    memory=1
    shift
fi
output=${1:?usage: build.sh [--memory] OUTPUT [SANITIZER [FILE...]]}
sanitizer=${2:-}
compiler=${CC:-gcc}
shift
[ $# -eq 0 ] || shift
if [ $# -gt 0 ]; then
    memory=1
    set -- -DFREEFLOW_TEST "$@"
fi
for source in "$here"/*.c; do
    if [ -n "$memory" ] || [ "$source" != "$here/loopback.c" ]; then
        set -- "$@" "$source"
    fi
done
[ -z "$memory" ] || set -- "$@" -DFREEFLOW_MEMORY

set -- -std=gnu11 -O2 -g -D_GNU_SOURCE -fno-strict-aliasing -fno-omit-frame-pointer -fPIE -pie \
    -Wall -Wextra -Wshadow -Werror -Wl,-z,noexecstack -Wl,-z,relro -Wl,-z,now "$@"
if [ -n "$sanitizer" ]; then
    # ThreadSanitizer does not know fences, so it may report accesses that they order.
    set -- "$@" "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Wno-tsan
else
    set -- "$@" -fstack-protector-strong -D_FORTIFY_SOURCE=2
fi
mkdir -p "$(dirname "$output")"
"$compiler" "$@" -ldl -pthread -lcrypto -lseccomp -o "$output.new"
mv "$output.new" "$output"
