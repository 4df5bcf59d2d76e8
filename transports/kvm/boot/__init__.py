"""Loading a kernel into guest memory, and the ACPI tables the kernel reads. Pure: bytes in, bytes out.

Not here: the state a vCPU begins in (``vm.entry``).
"""
