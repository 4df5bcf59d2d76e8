"""The input device, and where its events come from: a device of the host, a socket, a script."""
