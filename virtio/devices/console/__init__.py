"""The console device and where its ports end on the host: sockets, pseudo terminals, this process's own terminal."""
