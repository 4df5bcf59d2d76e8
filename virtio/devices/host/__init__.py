"""What several devices use of the host: listening sockets, character devices, advice. It knows no device."""
