"""The daemon: the command line, and in its rooms what the commands do. Nothing imports it but tests."""
