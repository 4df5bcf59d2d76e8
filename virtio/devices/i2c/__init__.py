"""The I2C device, and its bus: an adapter of the host, or simulated chips."""
