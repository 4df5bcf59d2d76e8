# What the scripts of this folder share: a temporary folder with an apt of its own, unpacked packages, and the comparison.
# Sourced after `set -euo pipefail`. Needs Debian's apt, dpkg-deb, tar and python3 on amd64; nothing is installed.

[ "$(dpkg --print-architecture)" = amd64 ] || { echo "needs an amd64 Debian" >&2; exit 2; }
T=$(mktemp -d)
children=() failed=0

# `timeout` and User-mode Linux lead process groups of their own.
stop() {
  local child
  for child in "${children[@]}"; do
    disown "$child" 2> /dev/null || true  # the shell would report that the child was killed
    kill -KILL -- "-$child" 2> /dev/null || kill -KILL "$child" 2> /dev/null || true
  done
  for child in "${children[@]}"; do
    for _ in {1..50}; do
      kill -0 "$child" 2> /dev/null || break
      sleep 0.1
    done
  done
  rm -rf "$T" || { sleep 1; rm -rf "$T"; }
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The mirror from which this machine's apt has its own Debian.
debian_mirror() {
  apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' | sed -n 's/^Debian|Debian|//p' | sort -u | head -n 1
}

# need_suite SUITE: package lists of SUITE, for an apt that takes nothing for installed.
need_suite() {
  local base=$T/apt-$1 mirror keyring signed=
  if [ -d "$base" ]; then return; fi
  mirror=$(debian_mirror)
  [ -n "$mirror" ] || { echo "apt knows no Debian mirror; run 'apt-get update' as root" >&2; exit 2; }
  for keyring in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
    if [ -z "$signed" ] && [ -e "$keyring" ]; then signed="[signed-by=$keyring]"; fi
  done
  mkdir -p "$base"/{sources,state/lists/partial,cache/archives/partial}
  : > "$base/state/status"
  echo "deb $signed ${mirror/#file:/copy:} $1 main" > "$base/sources/suite.list"
  cat > "$base/apt.conf" <<END
#clear APT::Update;
#clear APT::Architectures;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
APT::Architectures { "amd64"; };
APT::Default-Release "$1";
APT::Install-Recommends "false";
APT::Get::Assume-Yes "true";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$base/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "$base/state";
Dir::State::Status "$base/state/status";
Dir::Cache "$base/cache";
END
  echo "fetching the package lists of Debian $1"
  timeout 300 apt-get -c "$base/apt.conf" -qq --error-on=any update
}

# unpack SUITE TREE PACKAGE=VERSION...: these packages and all they depend on, unpacked into the new folder TREE.
unpack() {
  local suite=$1 tree=$2 archive name
  shift 2
  need_suite "$suite"
  echo "fetching $* of Debian $suite"
  rm -f "$T/apt-$suite/cache/archives"/*.deb
  timeout 600 apt-get -c "$T/apt-$suite/apt.conf" -qq --download-only install "$@" > "$T/apt.log" 2>&1 ||
    { cat "$T/apt.log" >&2; echo "that version is not in Debian $suite any more, or cannot be fetched" >&2; exit 1; }
  mkdir -p "$tree/usr"
  for name in bin sbin lib lib64; do mkdir "$tree/usr/$name"; ln -s "usr/$name" "$tree/$name"; done
  for archive in "$T/apt-$suite/cache/archives"/*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x --keep-directory-symlink --no-same-owner -C "$tree"
    rm "$archive"
  done
}

# in_tree TREE PROGRAM: the array `run` starts TREE's usr/bin/PROGRAM with TREE's own loader and libraries.
in_tree() {
  local libraries=$1/usr/lib/x86_64-linux-gnu folder
  local path=$libraries
  for folder in "$libraries"/*/; do path+=:${folder%/}; done
  run=("$1/usr/lib64/ld-linux-x86-64.so.2" --library-path "$path" --argv0 "$1/usr/bin/$2" "$1/usr/bin/$2")
}

# record SOCKET FEATURES PROTOCOL_FEATURES: starts a vhost-user back-end without a device at SOCKET, for one connection.
# It answers what is asked and writes a line for each message to SOCKET.log: NAME, an 8-byte payload as a number or the
# payload's length in brackets, further words, and what each descriptor is.
record() {
  python3 - "$@" > "$1.log" 2> "$1.errors" <<'PYTHON' &
import array
import os
import socket
import stat
import struct
import sys

NAMES = (
    "0 GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE SET_LOG_FD SET_VRING_NUM"
    " SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR GET_PROTOCOL_FEATURES"
    " SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU SET_BACKEND_REQ_FD IOTLB_MSG"
    " SET_VRING_ENDIAN GET_CONFIG SET_CONFIG CREATE_CRYPTO_SESSION CLOSE_CRYPTO_SESSION POSTCOPY_ADVISE POSTCOPY_LISTEN"
    " POSTCOPY_END GET_INFLIGHT_FD SET_INFLIGHT_FD GPU_SET_SOCKET RESET_DEVICE VRING_KICK GET_MAX_MEM_SLOTS ADD_MEM_REG"
    " REM_MEM_REG SET_STATUS GET_STATUS"
).split()
SOCKETS = {socket.SOCK_STREAM: "stream-socket", socket.SOCK_DGRAM: "datagram-socket"}
DISK = struct.pack("=Q", 64)  # a disk's config space: its sectors, then zeroes


def kind(fd):
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=os.dup(fd)) as connected:
            return SOCKETS.get(connected.type, "socket")
    return os.readlink(f"/proc/self/fd/{fd}").removeprefix("anon_inode:").split(":")[0].strip("[]")


def words(request, payload):
    if len(payload) == 8:
        yield f"{struct.unpack('=Q', payload)[0]:#x}"
    elif payload:
        yield f"[{len(payload)}]"
    if NAMES[request] == "SET_MEM_TABLE":  # a count and padding, then 32 bytes a region
        yield f"regions={struct.unpack_from('=I', payload)[0]}"


listener = socket.socket(socket.AF_UNIX)
listener.settimeout(60)
listener.bind(sys.argv[1])
listener.listen()
connection, _ = listener.accept()
connection.settimeout(60)
answers = {"GET_FEATURES": int(sys.argv[2], 0), "GET_PROTOCOL_FEATURES": int(sys.argv[3], 0)}
answers |= {"GET_QUEUE_NUM": 1, "GET_MAX_MEM_SLOTS": 8, "GET_STATUS": 0}
while True:
    header, ancillary, *_ = connection.recvmsg(12, socket.CMSG_SPACE(4 * 8))
    if len(header) < 12:
        break
    request, flags, size = struct.unpack("=III", header)
    payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
    descriptors = array.array("i", b"".join(data for _, _, data in ancillary))
    name = NAMES[request]
    print(name, *words(request, payload), *map(kind, descriptors), flush=True)
    for descriptor in descriptors:
        if name != "SET_BACKEND_REQ_FD":  # closing it ends User-mode Linux
            os.close(descriptor)
    if name in answers:
        reply = struct.pack("=Q", answers[name])
    elif name == "GET_VRING_BASE":
        reply = payload
    elif name == "GET_CONFIG":
        reply = (payload[:12] + DISK).ljust(size, b"\0")[:size]
    elif flags & 8:
        reply = bytes(8)
    else:
        continue
    connection.sendall(struct.pack("=III", request, 5, len(reply)) + reply)
PYTHON
  children+=($!)
  for _ in {1..200}; do
    if [ -S "$1" ]; then return; fi
    sleep 0.1
  done
  cat "$1.errors" >&2
  exit 1
}

# await SOCKET PATTERN: waits until a message that was recorded matches.
await() {
  for _ in {1..300}; do
    if grep -q -e "$2" "$1.log"; then return; fi
    sleep 0.1
  done
  echo "no message $2 came" >&2
  cat "$1.log" "$1.errors" >&2
  exit 1
}

# see WHAT SEEN EXPECTED: prints what was seen; if it is not what was expected, the script fails at its end.
see() {
  printf '%s: %s\n' "$1" "$2"
  if [ "$2" != "$3" ]; then printf '  CHANGED, expected: %s\n' "$3"; failed=1; fi
}

finish() {
  if [ "$failed" = 0 ]; then echo "as described"; fi
  exit "$failed"
}
