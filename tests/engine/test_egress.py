"""The guard: what leads into a private network is refused, however it is spelled and whatever a name server says."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine import egress
from batchery.engine.egress import RefusedError, check, parse_networks, parse_target, unfit

PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.1.1",
    "198.18.0.1",
    "203.0.113.5",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.1.2.3",
    "::ffff:0:127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450::1",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
]


def refuses(url: str, allowed: str = "") -> bool:
    try:
        check(parse_target(url), parse_networks(allowed))
    except RefusedError:
        return True
    return False


def in_url(address: str) -> str:
    return f"http://[{address}]:8080/x" if ":" in address else f"http://{address}:8080/x"


@pytest.mark.parametrize("address", PRIVATE)
def test_not_there(address: str) -> None:
    assert unfit(ipaddress.ip_address(address), ())
    assert refuses(in_url(address))
    assert refuses(in_url(address), "198.51.100.0/24,8.8.8.8,2001:db8:1::/48")


@pytest.mark.parametrize("address", PUBLIC)
def test_there(address: str) -> None:
    assert unfit(ipaddress.ip_address(address), ()) is None
    assert not refuses(in_url(address))


addresses = st.one_of(
    st.ip_addresses(v=4), st.ip_addresses(v=6), st.sampled_from([ipaddress.ip_address(text) for text in PRIVATE])
)


@given(addresses)
def test_what_is_let_through_is_global(address: egress.Address) -> None:
    """Against the standard library, which may know fewer special networks than we do, but no more."""
    if unfit(address, ()) is not None:
        return
    if isinstance(address, ipaddress.IPv6Address):
        assert address.sixtofour is None
        assert address.teredo is None
        address = address.ipv4_mapped or address
        if address in ipaddress.ip_network("64:ff9b::/96"):
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    assert address.is_global
    assert not any((address.is_multicast, address.is_private, address.is_loopback, address.is_link_local))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_an_ipv6_address(address: ipaddress.IPv4Address) -> None:
    """Is judged as itself where a system would send to it, and not let through where none should."""
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        inside = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address))
        assert (unfit(inside, ()) is None) == (unfit(address, ()) is None)
        assert unfit(inside, [ipaddress.ip_network(address)]) is None
    for outer in (int(address), (0x2002 << 112) + (int(address) << 80), (0x20010000 << 96) + int(address)):
        assert unfit(ipaddress.IPv6Address(outer), ()) is not None


@given(st.ip_addresses(), st.integers(0, 32))
def test_allowed_networks(address: egress.Address, length: int) -> None:
    """Whatever lies in an allowed network is let through, and a network allows nothing else."""
    network = ipaddress.ip_network(f"{address}/{length}", strict=False)
    assert unfit(address, [network]) is None
    assert (unfit(ipaddress.ip_address("127.0.0.1"), [network]) is None) == (
        ipaddress.ip_address("127.0.0.1") in network
    )


SPELLINGS = [
    "2130706433",
    "0x7f000001",
    "0X7F.1",
    "017700000001",
    "0177.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "0x7f.0x0.0x0.0x1",
    "00000177.0.0.1",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_odd_spellings(host: str) -> None:
    """Each is 127.0.0.1 to some client, and is to us."""
    target = parse_target(f"http://{host}/x")
    assert (target.host, target.authority) == ("127.0.0.1", "127.0.0.1")
    assert socket.inet_ntoa(socket.inet_aton(host.removesuffix("."))) == "127.0.0.1"
    assert refuses(f"http://{host}/x")
    assert not refuses(f"http://{host}/x", "127.0.0.0/8")


@given(st.integers(0, 0xFFFFFFFF), st.lists(st.sampled_from(["{}", "0x{:x}", "0{:o}"]), min_size=4, max_size=4))
def test_every_spelling_is_read_as_the_system_reads_it(value: int, styles: list[str]) -> None:
    for parts in range(1, 5):
        heads = [(value >> (8 * (3 - i))) & 0xFF for i in range(parts - 1)]
        numbers = [*heads, value & (256 ** (5 - parts) - 1)]
        host = ".".join(style.format(number) for style, number in zip(styles, numbers, strict=False))
        assert parse_target(f"http://{host}/").address == ipaddress.ip_address(socket.inet_aton(host))


@pytest.mark.parametrize(
    "host",
    [
        "1.2.3.4.5",
        "256.1.1.1",
        "1.2.3.256",
        "4294967296",
        "08.1.1.1",
        "example.1",
        "1..2",
        "[::1",
        "[fe80::1%25eth0]",
        "[::ffff:1.2.3]",
        "[v1.x]",
        "exa mple.com",
        "127.0.0.%31",
        "%6cocalhost",
        "-a.example",
        "a-.example",
        "a..example",
        ".",
        "a" * 64 + ".example",
        "a." * 130 + "example",
        "ex\u00e4mple.com",
        "\u0661\u0662\u0667.0.0.1",
        "user@example.com",
        "example.com:0",
        "example.com:x",
        "a*b.example",
    ],
)
def test_what_cannot_be_read_without_doubt(host: str) -> None:
    with pytest.raises(RefusedError):
        parse_target(f"http://{host}/")


@pytest.mark.parametrize("url", ["", "ftp://example.com/", "//example.com/", "http:///x", "http:example.com", "x"])
def test_no_url(url: str) -> None:
    with pytest.raises(RefusedError):
        parse_target(url)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost.", "a.b.localhost", "ip6-loopback"])
def test_names_of_this_machine(host: str) -> None:
    assert refuses(f"http://{host}:80/x")
    assert refuses(f"http://{host}:80/x", "10.0.0.0/8,fd00::/8")
    for allowed in ("127.0.0.1", "::1", "0.0.0.0/0", "126.0.0.0/7"):
        assert not refuses(f"http://{host}:80/x", allowed)


@pytest.mark.parametrize(
    ("url", "authority", "path", "origin"),
    [
        ("https://Example.COM", "example.com", "/", "https://example.com"),
        ("https://example.com.:443/a?b=c&d=%20", "example.com", "/a?b=c&d=%20", "https://example.com"),
        ("http://example.com:443/a//b?", "example.com:443", "/a//b", "http://example.com:443"),
        ("http://[2606:4700::1111]/?x", "[2606:4700::1111]", "/?x", "http://[2606:4700::1111]"),
        ("http://a_b.example/<>\"'{}", "a_b.example", "/%3C%3E%22'%7B%7D", "http://a_b.example"),
        ("https://xn--mnchen-3ya.example:8443/%2e%2E/;a=b", "xn--mnchen-3ya.example:8443", "/%2e%2E/;a=b", None),
    ],
)
def test_parts(url: str, authority: str, path: str, origin: str | None) -> None:
    target = parse_target(url)
    assert (target.authority, target.path) == (authority, path)
    assert target.origin == (origin or f"https://{authority}")


@given(st.text())
def test_a_target_fits_into_a_request(text: str) -> None:
    """Whatever the URL, nothing of it can end a line or a field of the request."""
    try:
        target = parse_target("http://example.com/" + text)
    except RefusedError:
        return
    for part in (target.path, target.authority):
        assert part.isascii()
        assert part.isprintable()
        assert " " not in part


class Names:
    """A name server that says what it is told to, and counts how often it is asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self.answers.pop(0)


async def test_all_addresses_of_a_name_must_be_fit() -> None:
    target = parse_target("https://hooks.example/")
    good = ["1.1.1.1", "2606:4700::1111", "1.1.1.1"]
    assert [str(found) for found in await egress.addresses(target, (), Names(good).lookup)] == good[:2]
    for bad in ("127.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "169.254.169.254"):
        for answer in ([bad], ["1.1.1.1", bad], [bad, "1.1.1.1"]):
            with pytest.raises(RefusedError, match=r"hooks\.example has the address"):
                await egress.addresses(target, (), Names(answer).lookup)
    allowed = parse_networks("127.0.0.0/8")
    assert await egress.addresses(target, allowed, Names(["127.0.0.1", "1.1.1.1"]).lookup)
    with pytest.raises(OSError, match="no address"):
        await egress.addresses(target, (), Names([]).lookup)


async def test_an_address_is_not_looked_up() -> None:
    names = Names()
    target = parse_target("https://0x01010101/")
    assert [str(found) for found in await egress.addresses(target, (), names.lookup)] == ["1.1.1.1"]
    with pytest.raises(RefusedError):
        await egress.addresses(parse_target("https://[::1]/"), (), names.lookup)
    assert names.asked == 0


async def test_the_system_s_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(await egress.lookup("localhost", 80)) <= {"127.0.0.1", "::1"}
    with pytest.raises(OSError, match="not a host name"):
        await egress.lookup("a" * 64, 80)

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(socket.gaierror, match="not known"):
        await egress.lookup("nothing.invalid", 80)


async def test_a_lookup_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be given up at once, and its late answer harms nobody."""
    asked, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> list[Any]:
        asked.set()
        go_on.wait(10)
        done.set()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    task = asyncio.create_task(egress.lookup("slow.invalid", 80))
    assert await asyncio.to_thread(asked.wait, 10)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert not done.is_set()
    go_on.set()
    assert await asyncio.to_thread(done.wait, 10)


def test_networks() -> None:
    assert [str(network) for network in parse_networks(" 10.0.0.0/8, 127.0.0.1 ,,::1,fd00::/8")] == [
        "10.0.0.0/8",
        "127.0.0.1/32",
        "::1/128",
        "fd00::/8",
    ]
    assert parse_networks("") == ()
    for bad in ("all", "10.0.0.1/8", "10.0.0.0/33", "localhost", "10.0.0.0/8;::1"):
        with pytest.raises(ValueError, match="write networks such as"):
            parse_networks(bad)
