#!/bin/sh
# Prints the Debian archive that this machine's own apt uses, so that a mirror or a cache serves us too.
set -eu
found=$(sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -E '/debian/?$' | head -n 1) || true
echo "${found:-http://deb.debian.org/debian}"
