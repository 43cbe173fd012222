#!/bin/sh
# Builds what the plugin has in C into a folder: the libraries that containers preload, the relay, the
# runtime, and the eBPF programs.
#
#   build-dataplane.sh FOLDER
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:?usage: build-dataplane.sh FOLDER}

"$top/dataplane/library/build.sh" "$folder/libfreeflow.so"
"$top/dataplane/verbs/build.sh" "$folder/verbs/libibverbs.so.1"
"$top/dataplane/relay/build.sh" "$folder/freeflow-relay"
"$top/plugin/runtime/build.sh" "$folder/freeflow-runc"
"$top/dataplane/ebpf/build.sh" "$folder/overlay.bpf.o"
