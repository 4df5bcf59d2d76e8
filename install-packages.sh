#!/bin/sh
# Install the packages of packages.txt that this Debian lacks. Says what it does; does nothing when nothing is missing.
set -eu
missing=
for package in $(sed 's/#.*//' "$(dirname "$0")/packages.txt"); do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
echo "== installing Debian packages:$missing"
root=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || { echo "not root and no sudo: as root, run: apt-get install$missing" >&2; exit 1; }
	root=sudo
fi
$root apt-get -qq update
# shellcheck disable=SC2086 # a list of words on purpose
$root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
