#!/bin/sh
# install-packages.sh SECTION...: install what this Debian lacks of those sections of packages.txt. Does nothing when
# nothing is missing. A package counts as there when an installed one provides its name.
set -eu
list=$(dirname "$0")/packages.txt

# Lines of the sections: "name", "name | name", or "needs-of NAME".
wanted() {
	for section in "$@"; do
		grep -q "^\[$section\]" "$list" || { echo "$0: $list has no section [$section]" >&2; exit 1; }
		sed -n "/^\[$section\]/,/^\[/{/^\[/d;s/#.*//;s/[ \t]*\$//;/./p;}" "$list"
	done
}

# Every name that an installed package has or provides.
present() {
	dpkg-query -W -f '${db:Status-Abbrev}|${Package}, ${Provides}\n' |
		sed -n 's/^.i .\{0,1\}|//p' | tr ',' '\n' | sed 's/(.*//;s/:.*//;s/[ \t]//g;/^$/d' | sort -u
}

root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		echo "not root and no sudo: as root, run: apt-get update; apt-get install --no-install-recommends$missing" >&2
		exit 1
	fi
}

update() {
	[ -z "$updated" ] || return 0
	echo "== updating the list of packages"
	updated=yes
	root apt-get -qq update
}

# What a package depends on, through packages of the kernel, but without those.
needs_of() {
	for name in $(apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Depends: //p' | sed 's/|[^,]*//g' |
		tr ',' '\n' | sed 's/(.*//;s/:.*//;s/[ \t]//g'); do
		case $name in
		linux-image-* | linux-base*) ;;
		linux-*) needs_of "$name" ;;
		*) echo "$name" ;;
		esac
	done
}

here=$(present)
updated=
missing=
is_here() { echo "$here" | grep -qxF -- "$1"; }
is_known() { [ -n "$(apt-cache show --no-all-versions "$1" 2>/dev/null)" ]; }
want() { # NAME...: alternatives
	for name in "$@"; do is_here "$name" && return; done
	first=$1
	if [ $# -gt 1 ]; then
		for name in "$@"; do is_known "$name" && { first=$name; break; }; done
	fi
	case "$missing " in *" $first "*) ;; *) missing="$missing $first" ;; esac
}

lines=$(wanted "$@")
while read -r first rest; do
	if [ "$first" = needs-of ]; then
		is_known "$rest" || update
		is_known "$rest" || { echo "apt knows no package $rest; run apt-get update as root" >&2; exit 1; }
		for name in $(needs_of "$rest" | sort -u); do want "$name"; done
	else
		# shellcheck disable=SC2046 # words on purpose
		want "$first" $(echo "$rest" | tr '|' ' ')
	fi
done <<LINES
$lines
LINES
[ -n "$missing" ] || exit 0
echo "== installing Debian packages:$missing"
update
# shellcheck disable=SC2086 # a list of words on purpose
root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
