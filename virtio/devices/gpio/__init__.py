"""The GPIO device, and its lines on a chip of the host or simulated."""
