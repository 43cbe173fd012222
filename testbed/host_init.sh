#!/bin/sh
# Process 1 of a host of the test bed, in new mount, PID, UTS and network namespaces. It makes the
# host's file system, and waits or becomes systemd.
#
#   host_init.sh NAME ENGINE_ROOT WORK [GROUP]
#       GROUP   systemd becomes process 1, with the control groups of this name as its own
set -eu
name=$1
engine=$2
work=$3
group=${4:-}
root="$work/root"

if [ -n "$group" ] && [ -z "${FREEFLOW_BED_INSIDE:-}" ]; then
    awk '$0 ~ / - cgroup2? / { print $5 }' /proc/self/mountinfo | while read -r point; do
        mkdir -p "$point/$group"
        for setting in cpus mems; do
            [ ! -e "$point/cpuset.$setting" ] || [ ! -e "$point/$group/cpuset.$setting" ] ||
                cat "$point/cpuset.$setting" >"$point/$group/cpuset.$setting"
        done
        echo $$ >"$point/$group/cgroup.procs"
    done
    FREEFLOW_BED_INSIDE=1 exec unshare --cgroup "$0" "$@"
fi

mount --make-rprivate /
hostname "$name"
mkdir -p "$root" "$work/upper" "$work/overlay" "$work/docker"
mount -t overlay overlay -o "lowerdir=$engine,upperdir=$work/upper,workdir=$work/overlay" "$root"
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/old" "$root/var/lib/docker" "$root/usr/local/bin"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
    # Version 1 for the controllers. A controller that is mounted nowhere is not needed here either.
    mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
    grep ' - cgroup ' /proc/self/mountinfo | while read -r _ _ _ _ point _ rest; do
        [ "${point#/sys/fs/cgroup/}" != "$point" ] || continue
        # The last field has the hierarchy's own options, such as rw,cpu or rw,name=systemd.
        options=${rest##* }
        mkdir -p "$root$point"
        mount -t cgroup -o "${options#rw,}" cgroup "$root$point"
    done
fi
[ ! -d /sys/fs/bpf ] || mount -t bpf bpf "$root/sys/fs/bpf" || true
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
# /dev, with /dev/shm, is the machine's; /run is the host's own.
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root/run/lock"
mount --bind "$work/docker" "$root/var/lib/docker"
echo "$name" >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost\n' "$name" >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
cd "$root"
pivot_root . old
umount -l /old
# As systemd does, so that dockerd's mounts reach the plugin, and the plugin's the host.
mount --make-rshared /
ip link set lo up
if [ -n "$group" ]; then
    # Nothing of Debian's is started. systemd leaves the kernel's settings to whoever runs containers.
    mkdir -p /run/systemd/system
    printf '[Unit]\nDescription=A host of a test bed\nDefaultDependencies=no\n' \
        >/run/systemd/system/testbed.target
    exec env -i container=testbed PATH="$PATH" \
        /lib/systemd/systemd --unit=testbed.target --log-target=null
fi
: >/run/host-is-up
while :; do
    sleep 3600 &
    wait "$!" || true
done
