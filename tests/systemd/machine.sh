#!/usr/bin/env bash
# usage: machine.sh FOLDER CGROUP PATH...
# A machine of its own for a test: a real systemd as PID 1 of private namespaces, in an overlay of this machine's files.
# What is written inside goes to a tmpfs below FOLDER and is gone with it. Each PATH is made reachable for the person
# `ann` (uid 1990), inside only. Killing this process ends everything inside.
#
# The kernel is shared, so nothing in there may touch it: /proc/sys is read-only, /dev is its own, the network is its
# own loopback, and the units that load modules, set sysctls or run udev are removed from the overlay.
set -euo pipefail
folder=$1 cgroup=$2
shift 2
echo $$ > "$cgroup/cgroup.procs"
exec unshare --cgroup --mount --propagation private --pid --fork --uts --ipc --net --kill-child=SIGKILL \
  bash -euo pipefail -c '
folder=$1; shift
mount -t tmpfs -o mode=755 machine "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
mount -t overlay machine -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
cd "$folder/root"

mount -t proc -o nosuid,nodev,noexec proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid dev dev
while read -r name major minor; do mknod -m 666 "dev/$name" c "$major" "$minor"; done <<< "null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0"
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
for link in ptmx:pts/ptmx fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s "${link#*:}" "dev/${link%%:*}"; done
mount -t tmpfs -o mode=755,nosuid,nodev run run
hostname machine
ip link set lo up || true

: > etc/fstab
tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id
rm -rf etc/systemd/system/*.wants lib/systemd/system/*.target.wants/* lib/systemd/system-generators/*
rm -rf usr/lib/systemd/user-environment-generators/* etc/systemd/user/*.wants var/log/journal
rm -f lib/systemd/system/systemd-logind.service.d/* lib/systemd/system/user@.service.d/*
mkdir -p etc/systemd/system/sockets.target.wants etc/systemd/system/systemd-logind.service.d etc/systemd/system.conf.d
ln -sf /dev/null etc/systemd/system/tmp.mount
for unit in systemd-journald.socket systemd-journald-dev-log.socket dbus.socket; do
  ln -s "/lib/systemd/system/$unit" etc/systemd/system/sockets.target.wants/
done
printf "[Service]\nProtectProc=default\nDeviceAllow=\nDevicePolicy=auto\nPrivateTmp=no\n" \
  > etc/systemd/system/systemd-logind.service.d/machine.conf

echo "ann:x:1990:1990::/home/ann:/bin/sh" >> etc/passwd
echo "ann:x:1990:" >> etc/group
echo "ann:*:19000:0:99999:7:::" >> etc/shadow
mkdir -p home/ann var/lib/systemd/linger
: > var/lib/systemd/linger/ann
chown -R 1990:1990 home/ann
for path in "$@"; do
  while [ "$path" != / ]; do chmod o+rx ".$path"; path=$(dirname "$path"); done
done

# pivot_root, not chroot: a process in a chroot may not make user namespaces.
mkdir .outside
pivot_root . .outside
exec env -i container=machine PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  /usr/sbin/chroot . /bin/sh -c "umount -l /.outside; rmdir /.outside; \
    exec /lib/systemd/systemd --system --unit=basic.target --log-target=journal-or-kmsg --show-status=0"
' machine "$folder" "$@"
