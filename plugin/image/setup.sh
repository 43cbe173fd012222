#!/bin/sh
# Installs the Debian packages that building and testing need, and those named as arguments. It is
# quick when nothing is missing, and starts no daemon.
set -eu

wanted="bpftool clang clang-format docker-compose docker-registry ethtool gcc iproute2 iptables libbpf-dev libc6-dev libibverbs-dev libjson-c-dev libnftables1 libseccomp-dev libssl-dev mmdebstrap musl-tools nftables procps \
python3-venv shellcheck strace util-linux"
# For virtual machines.
wanted="$wanted e2fsprogs kmod qemu-system-x86 zstd"
# Programs of verbs, and rdma-core's own tests, which use our libibverbs.
wanted="$wanted ibverbs-utils perftest python3-pyverbs rdmacm-utils"
# Applications that use verbs by libraries of their own.
wanted="$wanted libfabric-bin libgloo-dev libopenmpi-dev openmpi-bin qperf ucx-utils"
# To build programs of verbs, one of them from its Debian source.
wanted="$wanted dpkg-dev librdmacm-dev"
# Checks the alert rules, and asks what the Grafana board asks.
wanted="$wanted prometheus"
# Opens the live page.
wanted="$wanted chromium chromium-driver"
# Programs that the tests accelerate. Debian has Python's own tests in a package of their own.
wanted="$wanted cargo curl default-jdk-headless g++ golang-go iperf3 libasio-dev librust-tokio-dev rustc $(basename "$(readlink -f /usr/bin/python3 || echo python3.11)" |
    sed 's/python/libpython/')-testsuite haproxy memcached nginx-light nodejs postgresql redis-server rsync"
missing=
for package in $wanted "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "these packages are missing, and installing them needs root:$missing" >&2
    exit 1
fi
echo "installing:$missing"
# Packages with a daemon run this file before they start it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
