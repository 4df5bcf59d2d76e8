#!/bin/bash
# QEMU as a vhost-user front-end accepts protocol features that it does not implement.
#
# Versions: QEMU 7.2.22 (Debian 12, 1:7.2+dfsg-7+deb12u18+b3) and 10.0.13 (Debian 13, 1:10.0.13+ds-0+deb13u1).
# Guess:    SET_PROTOCOL_FEATURES names what both sides can do, so a back-end may offer all that it has and then do what
#           was accepted: take kicks by VRING_KICK messages after INBAND_NOTIFICATIONS (bit 14), read memory regions with
#           Xen's two further fields after XEN_MMAP (17).
# Seen:     the answer is the offer cut to the highest bit that QEMU has a name for: 0-16 in 7.2, 0-19 in 10.0. With bit
#           14 accepted kicks still come by descriptor; with bit 17 accepted a region still has no further fields (its
#           message has 40 bytes and not 48).
#           And a vhost-user netdev sends SET_VRING_ENABLE before any SET_FEATURES, though that message is for those who
#           have negotiated VHOST_USER_F_PROTOCOL_FEATURES there.
# Date:     November 2026
set -euo pipefail
cd "$(dirname "$0")"
. ./lib.sh

# start TREE NAME WORD...: a machine of QEMU's with shared memory and a chardev "c" at the recorder NAME.
start() {
  local tree=$1 name=$2
  shift 2
  in_tree "$tree" qemu-system-x86_64
  QEMU_MODULE_DIR=$tree/usr/lib/x86_64-linux-gnu/qemu timeout 60 "${run[@]}" -L "$tree/usr/share/qemu" \
    -L "$tree/usr/share/seabios" -nodefaults -display none -machine q35,accel=tcg,memory-backend=m -m 64 \
    -object memory-backend-memfd,id=m,size=64M,share=on -chardev "socket,id=c,path=$T/$name" "$@" \
    > "$T/$name.qemu" 2>&1 &
  children+=($!)
}

# look SUITE VERSION DISK_BITS NETDEV_BITS: what that QEMU accepts for a disk and for a netdev.
look() {
  unpack "$1" "$T/$1" "qemu-system-x86=$2"

  # All of the first 32 but INFLIGHT_SHMFD (12): with it QEMU would ask for an area that this back-end has not.
  # SeaBIOS is the disk's driver.
  record "$T/disk-$1" 0x140000000 0xffffefff
  start "$T/$1" "disk-$1" -device vhost-user-blk-pci,chardev=c,num-queues=1
  await "$T/disk-$1" '^SET_VRING_ENABLE 0x100000000'
  see "$1: a disk's offer 0xffffefff" "$(grep ^SET_PROTOCOL "$T/disk-$1.log")" "SET_PROTOCOL_FEATURES $3"
  see "$1: how the disk's ring is kicked" "$(grep KICK "$T/disk-$1.log" | sort -u)" "SET_VRING_KICK 0x0 eventfd"
  see "$1: the disk's memory regions" "$(grep MEM_REG "$T/disk-$1.log" | cut -d ' ' -f 1,2 | sort -u)" "ADD_MEM_REG [40]"

  record "$T/net-$1" 0x140000000 0xffffedff  # nor CONFIG (9), of which a netdev warns
  start "$T/$1" "net-$1" -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n,romfile=
  await "$T/net-$1" '^SET_VRING_ENABLE 0x100000001'
  see "$1: a netdev's offer 0xffffedff" "$(grep ^SET_PROTOCOL "$T/net-$1.log")" "SET_PROTOCOL_FEATURES $4"
  see "$1: the netdev's features when its rings are enabled" \
    "$(sed '/^SET_VRING_ENABLE 0x100000001/q' "$T/net-$1.log" | grep -c ^SET_FEATURES || true) messages" "0 messages"
}

look bookworm 1:7.2+dfsg-7+deb12u18+b3 0x1efff 0x1edff
look trixie 1:10.0.13+ds-0+deb13u1 0xfefff 0xfedff
finish
