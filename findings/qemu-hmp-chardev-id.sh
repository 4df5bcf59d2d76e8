#!/bin/bash
# The id of a chardev that QEMU's command line made is never free again for the human monitor's chardev-add.
#
# Versions: QEMU 7.2.22 (Debian 12, 1:7.2+dfsg-7+deb12u18+b3).
# Guess:    once chardev-remove has succeeded and query-chardev does not list the id any more, chardev-add takes the id,
#           in QMP and in the human monitor alike: that is how a vhost-user device's socket is exchanged.
# Seen:     QMP's chardev-add takes it. The human monitor's chardev-add refuses it as a duplicate: the -chardev option
#           stays behind in a table of options, which only the human monitor looks at. An id that the human monitor's
#           own chardev-add made can be used again there.
# Date:     November 2026
set -euo pipefail
cd "$(dirname "$0")"
. ./lib.sh

unpack bookworm "$T/tree" qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3
in_tree "$T/tree" qemu-system-x86_64
cat > "$T/talk.py" <<'PYTHON'
import json
import subprocess
import sys

with subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
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

    def human(name):
        said = ask("human-monitor-command", **{"command-line": f"chardev-add null,id={name}"})
        return said.split("\r\n")[0] or "made"

    def remove(name):
        ask("chardev-remove", id=name)
        if name in [each["label"] for each in ask("query-chardev")]:
            raise SystemExit(f"{name} is still listed")

    ask("qmp_capabilities")
    remove("option")
    print("human monitor, id of a removed -chardev|" + human("option"))
    ask("chardev-add", id="option", backend={"type": "null", "data": {}})
    print("QMP, the same id|made")
    remove("option")
    print("human monitor, after that was removed too|" + human("option"))
    human("monitor")
    remove("monitor")
    print("human monitor, id of a chardev of its own that was removed|" + human("monitor"))
    ask("quit")
PYTHON
QEMU_MODULE_DIR=$T/tree/usr/lib/x86_64-linux-gnu/qemu timeout 60 python3 "$T/talk.py" "${run[@]}" \
  -L "$T/tree/usr/share/qemu" -L "$T/tree/usr/share/seabios" -S -nodefaults -display none -machine q35,accel=tcg -m 64 \
  -chardev null,id=option -qmp stdio > "$T/said" 2> "$T/errors" || { cat "$T/errors" >&2; exit 1; }
expected=("Duplicate ID 'option' for chardev" made "Duplicate ID 'option' for chardev" made)
while IFS='|' read -r what said; do
  see "$what" "$said" "${expected[0]}"
  expected=("${expected[@]:1}")
done < "$T/said"
see "answers still expected" "${#expected[@]}" 0
finish
