"""The real-guest side: what runs inside a Linux guest, and what builds and boots it.

``kernel`` fetches a Debian cloud kernel, ``initramfs`` packs the guest's files, ``accel`` decides
between KVM and TCG, ``machine`` runs QEMU, ``service`` runs the daemon beside it, and ``demo``
(``python -m guest.demo``) puts them together. Nothing here is installed with the daemon.
"""
