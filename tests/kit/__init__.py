"""What tests share: ``front_end`` speaks vhost-user, ``guest`` drives devices, ``ring`` is the device's end of a queue.

``net`` has stations and networks, ``host`` what devices stand on, ``kvm`` machines, ``conversation`` recorded
front-ends. Not here: what users' own tests need (``virtio.testing``), the tests themselves.
"""
