#!/bin/sh
# Builds the relay.
#
#   build.sh OUTPUT [SANITIZER [FILE...]]
#
# SANITIZER: address,undefined or thread, for tests on this machine; empty: none.
# FILE: further sources, for tests; with them FREEFLOW_TEST is defined (tests/relay/faults.c).
#
# The relay loads libibverbs when it opens a device, so only its headers are needed here, and a relay on a host
# without it says so.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [SANITIZER [FILE...]]}
sanitizer=${2:-}
compiler=${CC:-gcc}
shift
[ $# -eq 0 ] || shift
[ $# -eq 0 ] || set -- -DFREEFLOW_TEST "$@"

set -- -std=gnu11 -O2 -g -D_GNU_SOURCE -fno-strict-aliasing -fno-omit-frame-pointer -fPIE -pie \
    -Wall -Wextra -Wshadow -Werror -Wl,-z,noexecstack -Wl,-z,relro -Wl,-z,now "$@"
if [ -n "$sanitizer" ]; then
    # ThreadSanitizer does not know fences, so it may report accesses that they order.
    set -- "$@" "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Wno-tsan
else
    set -- "$@" -fstack-protector-strong -D_FORTIFY_SOURCE=2
fi
mkdir -p "$(dirname "$output")"
"$compiler" "$@" "$here"/*.c -ldl -pthread -lcrypto -lseccomp -o "$output.new"
mv "$output.new" "$output"
