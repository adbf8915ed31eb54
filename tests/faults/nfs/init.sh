#!/bin/bash
# The first process of the lab's guest (lab.py starts it). One ext4 disk, a kernel NFS server that exports it, and
# clients of that export:
#   /mnt/exp  the disk itself      /mnt/a /mnt/b  NFS 4.2      /mnt/a3 /mnt/b3  NFS 3
# a and b do not share their caches. For the server of 4.2 they are two clients, as two hosts are, with a network
# between them: what one client has open twice is not protected against itself.
# The root is the host's own file system: whatever is written to is mounted over, or lies in $LAB.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
set -u

halt() { sync; echo o > /proc/sysrq-trigger; sleep 60; }
must() { "$@" || { echo "lab: $* failed"; halt; }; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/shm
for place in /run /dev/shm /mnt /var/lib/nfs; do must mount -t tmpfs tmpfs $place; done
mkdir -p /run/tmp /mnt/{exp,a,b,a3,b3} /var/lib/nfs/{v4recovery,sm,sm.bak,rpc_pipefs}
touch /var/lib/nfs/{etab,rmtab,state}
export TMPDIR=/run/tmp PYTHONDONTWRITEBYTECODE=1
hostname host-a
ip link set lo up

for module in veth nfsv3 nfsv4 nfsd; do must modprobe -d "$LAB/modules" $module; done
must mount -t ext4 /dev/ubda /mnt/exp
must mount -t nfsd nfsd /proc/fs/nfsd
# Short, so that a server that was restarted grants locks again within seconds. Both versions' grace bars both.
echo 10 > /proc/fs/nfsd/nfsv4leasetime
echo 10 > /proc/fs/nfsd/nfsv4gracetime
echo 5 > /proc/sys/fs/nfs/nlm_grace_period
must rpcbind -w
must rpc.statd --no-notify
must exportfs -o rw,sync,no_subtree_check,no_root_squash,insecure,fsid=0 '*:/mnt/exp'
must rpc.nfsd 8
must rpc.mountd
echo Y > /proc/fs/nfsd/v4_end_grace
must mount -t nfs -o vers=4.2 127.0.0.1:/ /mnt/a
must ip netns add b
must ip link add net-a type veth peer name net-b netns b
must ip address add 10.0.0.1/24 dev net-a
must ip link set net-a up
must ip -n b address add 10.0.0.2/24 dev net-b
must ip -n b link set net-b up
must nsenter --net=/run/netns/b unshare --uts sh -c 'hostname host-b && mount -t nfs -o vers=4.2 10.0.0.1:/ /mnt/b'
must mount -t nfs -o vers=3 127.0.0.1:/mnt/exp /mnt/a3
must mount -t nfs -o vers=3,nosharecache 127.0.0.1:/mnt/exp /mnt/b3

echo up > "$LAB/up"; sync "$LAB/up"
cd "$LAB_CWD" || halt
# lab.py leaves here what it wants to be run beside a command that has fallen silent.
while sleep 5; do
    [ -e "$LAB/ask" ] || continue
    mv "$LAB/ask" "$LAB/asked"
    bash "$LAB/asked" > "$LAB/answer" 2>&1 < /dev/null
    echo > "$LAB/answered"; sync "$LAB/answer" "$LAB/answered"
done &
bash "$LAB/command.sh" > "$LAB/output" 2>&1 < /dev/null
echo $? > "$LAB/status"; sync "$LAB/output" "$LAB/status"
umount /mnt/b3 /mnt/a3 /mnt/b /mnt/a
rpc.nfsd 0
umount /mnt/exp
halt
