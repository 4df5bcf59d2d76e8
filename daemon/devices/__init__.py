"""Which device types there are: our own, other distributions', single files; what is wrong with a class from outside.

Not here: a configured device's life (``running.served``).
"""
