"""Addresses of this machine."""

import socket


def free_address(host: str) -> tuple[str, int]:
    """``host`` and a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])
