#!/bin/bash
# User-mode Linux as a vhost-user front-end notifies by a stream socket, and sends a memory table longer than its count.
#
# Version: User-mode Linux 6.1.176 (Debian 12, user-mode-linux 6.1um4+b13), its virtio_uml and virtio_blk drivers.
# Guess:   the descriptor of SET_VRING_CALL is an eventfd, as with every other front-end, and SET_MEM_TABLE is as long as
#          the regions that it counts. A back-end may then write 8 bytes without O_NONBLOCK, and may hold the length to
#          8 + 32 * regions.
# Seen:    the call descriptor is one end of a stream socket: a blocking write to it can wait for ever. The kick
#          descriptor is an eventfd. SET_MEM_TABLE says that there is one region, and has 72 bytes: room for two.
# Date:    November 2026
set -euo pipefail
cd "$(dirname "$0")"
. ./lib.sh

unpack bookworm "$T/uml" user-mode-linux=6.1um4+b13 busybox-static=1:1.35.0-4+deb12u1+b1

# The disk's driver is a module, so the kernel needs a userspace that loads it.
module=$(find "$T/uml/usr/lib/uml/modules" -name virtio_blk.ko)
printf '#!/busybox sh\n/busybox insmod /virtio_blk.ko\n' > "$T/init"
python3 - "$T/initrd" "$T/uml/bin/busybox" "$T/init" "$module" <<'PYTHON'
import os
import sys

place, *files = sys.argv[1:]
with open(place, "wb") as archive:

    def add(name, mode, content):
        fields = [1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive.write(head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4))

    for file in files:
        with open(file, "rb") as source:
            add(os.path.basename(file), 0o100755, source.read())
    add("TRAILER!!!", 0, b"")
PYTHON

# VERSION_1 and protocol features; of those CONFIG, REPLY_ACK and BACKEND_REQ, which this kernel knows.
record "$T/disk" 0x140000000 0x228
mkdir "$T/home"
# No `timeout` before it: it makes a session of its own, which the script ends by its number, within 30 s.
HOME=$T/home TMPDIR=$T "$T/uml/usr/bin/linux.uml" mem=64M initrd="$T/initrd" rdinit=/init \
  virtio_uml.device="$T/disk:2" con=null con0=null,fd:1 < /dev/null > "$T/console" 2>&1 &
children+=($!)
await "$T/disk" '^SET_VRING_KICK'
see "memory" "$(grep ^SET_MEM_TABLE "$T/disk.log" | cut -d ' ' -f 1-3)" "SET_MEM_TABLE [72] regions=1"
see "descriptor of SET_VRING_CALL" "$(awk '/^SET_VRING_CALL/ {print $3}' "$T/disk.log")" "stream-socket"
see "descriptor of SET_VRING_KICK" "$(awk '/^SET_VRING_KICK/ {print $3}' "$T/disk.log")" "eventfd"
finish
