"""TCP between two guests, by iperf3."""

from __future__ import annotations

import json

from guest.boot.machine import Guest

# What the sender's kernel and the receiver's may hold is small beside what is sent: see below.
WINDOW = "--window 128K"


async def tcp_goes_both_ways(client: Guest, server: Guest, address: str, sent: int) -> None:
    """`sent` bytes arrive in each direction; address is the server's."""
    # A server for each direction: one that still ends the first test refuses the second.
    for port, direction in ((5201, ""), (5202, "--reverse")):
        listens = f"grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6"
        await server.run(f"iperf3 --server --one-off --daemon --port {port}; until {listens}; do usleep 10000; done")
        answer = await client.run(
            f"iperf3 --client {address} --port {port} --bytes {sent} {WINDOW} {direction} --json", timeout_seconds=120
        )
        report = json.loads("\n".join(answer.lines))
        assert "error" not in report
        end = report["end"]
        assert end["sum_sent"]["bytes"] >= sent
        # The receiver counts when the sender has written its last byte: what the kernels' buffers hold is not counted.
        assert end["sum_received"]["bytes"] >= sent * 0.9
