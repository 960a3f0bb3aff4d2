"""Ports on loopback for servers of tests."""

import socket


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def free_port() -> int:
    """Return a port that nobody listens at now."""
    return free_ports(1)[0]
