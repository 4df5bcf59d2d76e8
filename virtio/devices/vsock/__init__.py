"""The socket device: packets, connections with their credit, the host's Unix sockets, shares between guests."""
