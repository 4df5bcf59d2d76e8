"""``hyperbell doorbells`` and what comes of it: the report, what a hypercall is worth to a device, who may ring so.

Not here: the measurement's guest (``transports.kvm.doorbell_cost``).
"""
