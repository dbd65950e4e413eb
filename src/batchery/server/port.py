"""A port to listen on that no other server takes.

The HTTP server shares its port with any other of the same user that would (SO_REUSEPORT): started at the same moment,
two would both listen, and each would get half of the connections, and answer 404 to what the other has. So a port is
looked at first, and held against other batchery servers from then on.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

ATTEMPTS = 20
"""Ports that are tried where any will do."""


class AddressInUse(OSError):
    """The address cannot be listened at, most often because somebody else does; the message says which and why."""


class Port:
    """A port of an address, held until `close` or the end of the process.

    Attributes:
        address: of the host; the first one of a name.
        number: the port.
    """

    def __init__(self, address: str, number: int, hold: socket.socket | None) -> None:
        self.address = address
        self.number = number
        self._hold = hold

    def check(self) -> None:
        """Make sure that nobody else listens there, who would not know that it is held.

        Raises:
            AddressInUse: somebody does.
        """
        _probe(self.address, self.number)

    def close(self) -> None:
        """Let others have it."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None


def take_port(host: str, port: int) -> Port:
    """Take a port that is free.

    Args:
        host: a name or an address; the first address of a name is taken.
        port: from 1 to 65535, or 0 for any.

    Raises:
        AddressInUse: somebody else has it.
        OSError: the address cannot be listened at.
    """
    for attempt in range(1, ATTEMPTS + 1):
        address, number = _probe(host, port)
        try:
            return Port(address, number, _hold(address, number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if port or attempt == ATTEMPTS:
                raise AddressInUse(f"cannot listen at {host}:{number}: {error.strerror}") from None
    raise AssertionError


def _probe(host: str, port: int) -> tuple[str, int]:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise AddressInUse(f"cannot listen at {host}:{port}: {error.strerror}") from error
        return str(address[0]), int(probe.getsockname()[1])


def _hold(address: str, number: int) -> socket.socket | None:
    """Hold a port against other batchery servers of this user on this machine, or in this container.

    A name that no file has (an abstract one) goes when the process does, however that ends. Elsewhere than on Linux
    there are none.
    """
    if sys.platform != "linux":
        return None
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        hold.bind(f"\0batchery-port-{os.getuid()}-{address}-{number}")
    except OSError:
        hold.close()
        raise
    return hold
