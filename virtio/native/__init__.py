"""The Python faces of the data plane, and all that may import it: thin, one a C object, each with its owner.

Not here: when a queue starts or stops (``backend``).
"""
