#!/bin/bash
# guest.sh is process 1 of the virtual machine of vm.py: it puts a memory overlay over the host's root, makes four soft-RoCE
# devices whose traffic crosses a bridge, runs the command, writes its status, and switches the machine off.
# The kernel passes: stage, directory of the kernel's modules, directory of this run.
stage=$1 kernel=$2 run=$3

off() {
  sync
  echo o >/proc/sysrq-trigger
  sleep 60
}
fail() {
  echo "guest: $*"
  off
}

if [[ $stage == root ]]; then
  export PATH=/usr/sbin:/usr/bin:/sbin:/bin
  mount -t proc proc /proc && mount -t sysfs sys /sys
  mountpoint -q /dev || mount -t devtmpfs dev /dev
  exec <>/dev/console 1>&0 2>&1
  modprobe -d "$kernel" overlay || fail "no overlay"
  mount -t tmpfs -o size=80% tmpfs /run && mkdir /run/{upper,work,root} || fail "no tmpfs"
  root=/run/root
  mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work overlay $root || fail "no overlay root"
  for d in proc sys dev; do mount --move /$d $root/$d || fail "cannot move /$d"; done
  mount -t tmpfs tmpfs $root/run
  mkdir -p $root/dev/{pts,shm} $root/lib/modules
  mount -t devpts -o ptmxmode=666 devpts $root/dev/pts
  mount -t tmpfs -o mode=1777 tmpfs $root/dev/shm
  mount --bind "$kernel/lib/modules" $root/lib/modules || fail "no modules"
  exec chroot $root "$0" system "$kernel" "$run"
fi

for port in /sys/class/virtio-ports/*; do
  ln -s "/dev/${port##*/}" "/run/$(<"$port/name")"
done
ln -sf /proc/self/fd /dev/fd
chmod 666 /dev/fuse 2>/dev/null
ip link set lo up
modprobe -a veth bridge rdma_rxe rdma_ucm || fail "no modules for RDMA"

# All addresses are this system's own, so packets between them would never leave it: what is sent from NIC i's address is
# looked up in a table of its own, before the table of local addresses.
echo 20000 >/proc/sys/net/core/netdev_max_backlog
for conf in all default; do
  for setting in accept_local=1 rp_filter=0 arp_ignore=1 arp_announce=2; do
    echo "${setting#*=}" >/proc/sys/net/ipv4/conf/$conf/"${setting%=*}"
  done
done
ip rule add pref 50 lookup local && ip rule del pref 0 || fail "no rules"
ip netns add fabric && ip -n fabric link add bridge0 type bridge forward_delay 0 && ip -n fabric link set bridge0 mtu 4500 up ||
  fail "no bridge"
mac() { printf '02:4b:56:46:53:%02x' "$1"; }
for i in 0 1 2 3; do
  address=10.90.0.$((i + 1)) table=$((200 + i))
  ip link add "eth$i" mtu 4500 address "$(mac "$i")" type veth peer name "port$i" mtu 4500 netns fabric &&
    ip -n fabric link set "port$i" master bridge0 up &&
    ip address add $address/32 dev "eth$i" && ip link set "eth$i" up &&
    ip route add local $address dev "eth$i" table $table &&
    ip route add 10.90.0.0/24 dev "eth$i" src $address table $table &&
    ip rule add pref 10 iif lo from $address to 10.90.0.0/24 lookup $table &&
    ip rule add pref 11 oif "eth$i" from $address to 10.90.0.0/24 lookup $table &&
    rdma link add "rxe$i" type rxe netdev "eth$i" || fail "no rxe$i"
  for j in 0 1 2 3; do
    [[ $i == "$j" ]] || ip neigh replace 10.90.0.$((j + 1)) lladdr "$(mac $j)" dev "eth$i" nud permanent || fail "no neighbours"
  done
done
for i in 0 1 2 3; do # the port and the GID of the IPv4 address come a moment later
  port=/sys/class/infiniband/rxe$i/ports/1
  for ((t = 0; ; t++)); do
    [[ $(<$port/state) == *ACTIVE* ]] && grep -q :ffff:0a5a: $port/gids/* 2>/dev/null && break
    ((t < 500)) || fail "rxe$i does not become active"
    sleep 0.02
  done
done

ulimit -l unlimited
ulimit -c 0
setsid -w /bin/bash "$run/command" </dev/null >/run/output 2>&1
echo $? >/run/status
off
