# shellcheck shell=sh
# A guest runs this before its agent; /sbin/vm-init of the image sources it, as process 1 (guest_images.py).
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /dev/pts /dev/shm /run/lock /run/netns
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
# As systemd does, so that dockerd's mounts reach the plugin, and the plugin's the host.
mount --make-rshared /

# From the kernel's command line: freeflow.number=2 freeflow.mtu=4200
number=1
mtu=1500
read -r words </proc/cmdline
for word in $words; do
    case $word in
    freeflow.number=*) number=${word#*=} ;;
    freeflow.mtu=*) mtu=${word#*=} ;;
    esac
done
hostname "guest$number"
printf '127.0.0.1 localhost guest%s\n::1 localhost\n' "$number" >/etc/hosts
ip -batch - <<EOF
link set lo up
link set eth0 mtu $mtu
addr add 10.99.0.$number/24 dev eth0
addr add fd99::$number/64 dev eth0 nodad
link set eth0 up
route add default via 10.99.0.254 dev eth0
EOF
: >/etc/resolv.conf
# RDMA and eBPF lock memory. The guests' shell is dash, which has both options.
# shellcheck disable=SC3045
ulimit -l unlimited
# shellcheck disable=SC3045
ulimit -n 65536
export HOME=/root LANG=C.UTF-8
cd /root || exit
exec python3 -E -S /src/testbed/vm/agent.py
