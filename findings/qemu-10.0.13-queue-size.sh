#!/bin/bash
# QEMU 10.0.13 gives every virtio queue 1,024 entries, whatever its device asked for.
#
# Versions: QEMU 10.0.13 (Debian 13, 1:10.0.13+ds-0+deb13u1) against QEMU 7.2.22 (Debian 12, 1:7.2+dfsg-7+deb12u18+b3).
# Guess:    a virtio-blk-pci with queue-size=128 has a queue of 128 entries, and a virtio-rng-pci, whose device code asks
#           for 8, one of 8. A stable release changes no default that a guest and every vhost-user back-end sees.
# Seen:     that holds for 7.2.22. In 10.0.13 both queues have 1,024 entries before a guest has touched them, by the
#           device's own count (QMP x-query-virtio-queue-status, "vring-num") and by its default ("vring-num-default").
#           A back-end that allows less than 1,024 entries meets a QEMU that exceeds what was configured.
# Date:     November 2026
set -euo pipefail
cd "$(dirname "$0")"
. ./lib.sh

# sizes TREE: "VERSION blk SIZE/DEFAULT rng SIZE/DEFAULT", of a machine that has not run an instruction.
sizes() {
  in_tree "$1" qemu-system-x86_64
  QEMU_MODULE_DIR=$1/usr/lib/x86_64-linux-gnu/qemu timeout 60 python3 - "$T/disk" "${run[@]}" -L "$1/usr/share/qemu" \
    -L "$1/usr/share/seabios" <<'PYTHON'
import json
import subprocess
import sys

disk, *command = sys.argv[1:]
with open(disk, "wb") as file:
    file.truncate(1 << 20)
command += ["-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64", "-qmp", "stdio"]
command += ["-blockdev", f"driver=file,filename={disk},node-name=b"]
command += ["-device", "virtio-blk-pci,id=blk,drive=b,queue-size=128,num-queues=1,romfile="]
command += ["-object", "rng-builtin,id=r", "-device", "virtio-rng-pci,id=rng,rng=r,romfile="]
with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
    assert qemu.stdin and qemu.stdout

    def ask(name, **arguments):
        qemu.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        qemu.stdin.flush()
        for line in qemu.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise SystemExit(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise SystemExit(f"QEMU ended at {name}")

    ask("qmp_capabilities")
    number = ask("query-version")["qemu"]
    words = [f"{number['major']}.{number['minor']}.{number['micro']}"]
    for name in ("blk", "rng"):
        path = f"/machine/peripheral/{name}/virtio-backend"
        status = ask("x-query-virtio-queue-status", path=path, queue=0)
        words.append(f"{name} {status['vring-num']}/{status['vring-num-default']}")
    ask("quit")
print(*words)
PYTHON
}

unpack bookworm "$T/old" qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3
see "Debian 12's QEMU, entries/default" "$(sizes "$T/old")" "7.2.22 blk 128/128 rng 8/8"
unpack trixie "$T/new" qemu-system-x86=1:10.0.13+ds-0+deb13u1
see "Debian 13's QEMU, entries/default" "$(sizes "$T/new")" "10.0.13 blk 1024/1024 rng 1024/1024"
finish
