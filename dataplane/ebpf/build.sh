#!/bin/sh
# Builds the BPF programs: one object for all kernels, from the kernel's public headers alone.
#
#   build.sh OUTPUT
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT}
machine=$(gcc -dumpmachine)

mkdir -p "$(dirname "$output")"
# -mcpu=v2: the instruction set that every kernel with these helpers supports.
clang -std=gnu11 -O2 -g -target bpf -mcpu=v2 -Wall -Wextra -Wshadow -Werror -I"/usr/include/$machine" \
    -c "$here/overlay.bpf.c" -o "$output.new"
mv "$output.new" "$output"
