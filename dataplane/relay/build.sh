#!/bin/sh
# Builds the relay.
#
#   build.sh OUTPUT [SANITIZER]      SANITIZER: address,undefined or thread, for tests on this machine
#
# libibverbs is looked for when a device is opened, and only its headers are needed here: a host without it has a relay that
# says so.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [SANITIZER]}
sanitizer=${2:-}
compiler=${CC:-gcc}

set -- -std=gnu11 -O2 -g -D_GNU_SOURCE -fno-strict-aliasing -fno-omit-frame-pointer -fPIE -pie \
    -Wall -Wextra -Wshadow -Werror -Wl,-z,noexecstack -Wl,-z,relro -Wl,-z,now
if [ -n "$sanitizer" ]; then
    # ThreadSanitizer knows no fences: what they order it may report all the same.
    set -- "$@" "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Wno-tsan
else
    set -- "$@" -fstack-protector-strong -D_FORTIFY_SOURCE=2
fi
mkdir -p "$(dirname "$output")"
"$compiler" "$@" "$here"/*.c -ldl -pthread -o "$output.new"
mv "$output.new" "$output"
