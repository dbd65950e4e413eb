"""The guard between webhooks and the network: whoever creates a batch names a URL, and this process must not be their
way into the network that it stands in.

An address is fit when the public internet routes it, or when the operator has allowed its network. A host name is
resolved here, all of its addresses must be fit, and callers connect to exactly those: nothing is resolved a second
time, so a name that changes between the check and the connection gains nothing.

The networks are those that IANA lists as not globally reachable
(https://www.iana.org/assignments/iana-ipv4-special-registry, .../iana-ipv6-special-registry). They are spelled out,
since what `ipaddress` calls global differs between releases of Python.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import quote, urlsplit

import msgspec

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host name for a port. Raises OSError when there are none."""

MAX_NAME = 253

_UNFIT_V4 = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared (carrier-grade NAT)"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local (cloud metadata)"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "reserved (6to4 relays)"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        # Routed like any other, but in Azure it is the host beneath the virtual machine.
        ("168.63.129.16/32", "cloud platform"),
    )
)
_UNFIT_V6 = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
        ("2001::/23", "reserved (Teredo and others)"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("3fff::/20", "documentation"),
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

_LOOPBACK: tuple[Network, ...] = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))
_LOCAL_NAMES = frozenset(("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"))
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
_QUERY_SAFE = _PATH_SAFE + "?[]"


class RefusedError(Exception):
    """A webhook's URL leads where none is sent to. The text goes on from a "because"; it shows no path and no query."""


class Target(msgspec.Struct, frozen=True):
    """A URL, taken apart.

    Attributes:
        tls: whether it is https.
        host: its name in lower case, or its address in the usual spelling, without brackets.
        port: from 1 to 65 535.
        path: with the query, as a request line has it.
        address: what `host` is, if it is not a name.
    """

    tls: bool
    host: str
    port: int
    path: str
    address: Address | None

    @property
    def authority(self) -> str:
        """As the header `Host` has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """What may be logged: paths and queries often hold a secret."""
        return f"{'https' if self.tls else 'http'}://{self.authority}"


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks from a list such as `10.0.0.0/8,127.0.0.1,::1`.

    Raises:
        ValueError: names the entry that is not a network.
    """
    networks: list[Network] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError as error:
            raise ValueError(f"{error}; write networks such as 10.0.0.0/8,127.0.0.1,::1") from None
    return tuple(networks)


def unfit(address: Address, allowed: Sequence[Network]) -> str | None:
    """What kind of address it is, if nothing may be sent there; None if something may.

    Args:
        allowed: the operator's exceptions.
    """
    if any(address in network for network in allowed):
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64 or address in _MAPPED:
            return unfit(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF), allowed)
        kind = next((kind for network, kind in _UNFIT_V6 if address in network), None)
        return kind or (None if address in _GLOBAL_V6 else "reserved")
    return next((kind for network, kind in _UNFIT_V4 if address in network), None)


def parse_target(url: str) -> Target:
    """Take a URL apart, so that every later step goes by the same reading of it.

    Raises:
        RefusedError: it cannot be read without doubt.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RefusedError(f"it cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise RefusedError("it is not an http or https URL with a host and without a user name")
    tls = parts.scheme == "https"
    if port is None:
        port = 443 if tls else 80
    if port == 0:
        raise RefusedError("no server listens on port 0")
    path = quote(parts.path or "/", safe=_PATH_SAFE)
    if parts.query:
        path += "?" + quote(parts.query, safe=_QUERY_SAFE)
    address = _literal(host, bracketed=parts.netloc.startswith("["))
    return Target(tls, str(address) if address else _name(host), port, path, address)


def _literal(host: str, *, bracketed: bool) -> Address | None:
    """The address that a host is, in any spelling that a client somewhere takes for one; None for a name."""
    if bracketed:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise RefusedError(f"{host!r} is not an IPv6 address") from None
        if address.scope_id is not None:
            raise RefusedError(f"{host!r} is an address of one link only")
        return address
    labels = host.removesuffix(".").split(".")
    if not _NUMBER.fullmatch(labels[-1]):
        return None
    # From here as https://url.spec.whatwg.org/#concept-ipv4-parser has it: a host that ends in a number is an address.
    if len(labels) > 4 or not all(_NUMBER.fullmatch(label) for label in labels):
        raise RefusedError(f"{host!r} is neither a name nor an IPv4 address")
    *heads, last = map(_number, labels)
    if any(head > 255 for head in heads) or last >= 256 ** (4 - len(heads)):
        raise RefusedError(f"{host!r} is neither a name nor an IPv4 address")
    return ipaddress.IPv4Address(sum(head << (8 * (3 - i)) for i, head in enumerate(heads)) + last)


def _number(label: str) -> int:
    try:
        if label[:2] in ("0x", "0X"):
            return int(label[2:] or "0", 16)
        return int(label, 8 if label[0] == "0" else 10)
    except ValueError:
        raise RefusedError(f"{label!r} is not a number of an IPv4 address") from None


def _name(host: str) -> str:
    name = host.lower().removesuffix(".")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise RefusedError(f"{host!r} is not a host name")
    return name


def check(target: Target, allowed: Sequence[Network]) -> None:
    """Refuse what can be refused without asking for the addresses of a name.

    Raises:
        RefusedError: the host is an address where nothing is sent, or this machine's name for itself.
    """
    if target.address is not None:
        _require_fit([target.address], target.host, allowed)
    elif (target.host in _LOCAL_NAMES or target.host.endswith(".localhost")) and not any(
        network.overlaps(loopback)
        for network in allowed
        for loopback in _LOOPBACK
        if loopback.version == network.version
    ):
        raise RefusedError(f"{target.host} is this server's own machine")


async def addresses(target: Target, allowed: Sequence[Network], lookup: Lookup) -> list[Address]:
    """The addresses to connect to, each of them checked.

    Raises:
        RefusedError: one of them is not fit.
        OSError: the name has none.
    """
    check(target, allowed)
    if target.address is not None:
        return [target.address]
    found: list[Address] = []
    for text in await lookup(target.host, target.port):
        address = ipaddress.ip_address(text.partition("%")[0])
        if address not in found:
            found.append(address)
    if not found:
        raise OSError("the name has no address")
    _require_fit(found, target.host, allowed)
    return found


def _require_fit(found: Sequence[Address], host: str, allowed: Sequence[Network]) -> None:
    for address in found:
        kind = unfit(address, allowed)
        if kind is not None:
            what = host if str(address) == host else f"{host} has the address {address}, which"
            raise RefusedError(f"{what} is {kind}")


async def lookup(host: str, port: int) -> list[str]:
    """The system's addresses of a name, the best first.

    In a thread of its own, which nobody waits for: a name server that does not answer must neither fill the pool that
    other parts of this process use, nor hold up its end.

    Raises:
        OSError: there are none.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(found: list[str] | OSError) -> None:
        if answer.done():  # nobody waits any more
            return
        if isinstance(found, OSError):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def ask() -> None:
        found: list[str] | OSError
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
            found = [str(info[4][0]) for info in infos]
        except OSError as error:
            found = error
        except UnicodeError:  # a label that the codec for host names does not take
            found = OSError("it is not a host name")
        try:
            loop.call_soon_threadsafe(settle, found)
        except RuntimeError:  # the loop has ended meanwhile
            return

    threading.Thread(target=ask, name="webhook-lookup", daemon=True).start()
    return await answer
