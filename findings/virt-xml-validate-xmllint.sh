#!/bin/bash
# virt-xml-validate calls a program that its package does not depend on, and then blames the document.
#
# Versions: libvirt-clients 9.0.0-4+deb12u2 and libxml2-utils 2.9.14+dfsg-1.3~deb12u6 (Debian 12).
# Guess:    what libvirt-clients depends on is all that virt-xml-validate needs, and a valid domain validates; a missing
#           program would be named ("command not found").
# Seen:     xmllint is in none of the packages that libvirt-clients brings. Without it the answer to a valid document is
#           "cannot determine schema type" and status 3: the shell's complaint is sent away. With xmllint the same
#           document gets beyond that, and xmllint finds it valid by the schema of libvirt.
#           Debian 13's libvirt-clients 11.3.0-3+deb13u3 depends on libxml2-utils.
# Date:     November 2026
set -euo pipefail
cd "$(dirname "$0")"
. ./lib.sh

unpack bookworm "$T/libvirt" libvirt-clients=9.0.0-4+deb12u2
see "xmllint in libvirt-clients and all it depends on" "$(find "$T/libvirt" -name xmllint | wc -l) files" "0 files"

cat > "$T/domain.xml" <<'XML'
<domain type="kvm">
  <name>guest</name>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64">hvm</type></os>
</domain>
XML
# A PATH with the tools that every Debian has (Essential: yes), and no others.
mkdir "$T/path"
for tool in awk basename cat grep mktemp rm sed; do ln -s "$(command -v "$tool")" "$T/path/$tool"; done

# validate: what virt-xml-validate says of the document, and its status as the last line.
validate() {
  local status=0
  timeout 60 env PATH="$T/path" /bin/sh "$T/libvirt/usr/bin/virt-xml-validate" "$T/domain.xml" 2>&1 || status=$?
  echo "status $status"
}

see "without xmllint" "$(validate | sed "s|$T/||g" | paste -s -d ' ')" \
  "libvirt/usr/bin/virt-xml-validate: cannot determine schema type for domain.xml status 3"

unpack bookworm "$T/xml" libxml2-utils=2.9.14+dfsg-1.3~deb12u6
in_tree "$T/xml" xmllint
{ echo '#!/bin/sh'; printf 'exec'; printf ' %q' "${run[@]}"; echo ' "$@"'; } > "$T/path/xmllint"
chmod +x "$T/path/xmllint"
# It says that the document is valid, or that libvirt's schema is not installed on this machine: then it knew which.
see "with xmllint, knows that it is a domain" \
  "$(validate | grep -c -e 'domain.xml validates' -e 'schemas/domain.rng does not exist') line" "1 line"
see "xmllint with libvirt's schema" "$(timeout 60 "$T/path/xmllint" --noout --relaxng \
  "$T/libvirt/usr/share/libvirt/schemas/domain.rng" "$T/domain.xml" 2>&1 | sed 's|.*/||')" "domain.xml validates"
finish
