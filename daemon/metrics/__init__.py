"""Prometheus: the families, and the page over HTTP. What they show is read from one snapshot (``daemon.state``)."""
