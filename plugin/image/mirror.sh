#!/bin/sh
# Prints the URL of the Debian archive that this machine's own apt uses, which may be a mirror.
set -eu
found=$(sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -E '/debian/?$' | head -n 1) || true
echo "${found:-http://deb.debian.org/debian}"
