"""``hyperbell serve``: the nursery, each device's life, the control socket, limits, the service manager.

Not here: what a device is (``devices``), what ``check`` says before (``checks``).
"""
