"""Which addresses a request may go to: a URL in data must not reach what only this machine can reach.

The check belongs where the socket is made, because every way to write an address (``0x7f.1``, ``2130706433``,
a name that resolves to 127.0.0.1 the second time, a redirect) ends there, and some never see a resolver.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: The well-known NAT64 prefix (RFC 6052): how an IPv6-only network reaches the IPv4 address in the last 32
#: bits. The local-use one (RFC 8215) is not public and is refused.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

_KINDS: Final = ("unspecified", "loopback", "link_local", "multicast", "private", "reserved")


def refused(address: str) -> str:
    """Why `address` (as a socket gets it) is not for requests from outside; empty if it is a public one.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64) is judged by that, one of Teredo by
    that too.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unreadable"
    return next((kind for each in _targets(parsed) if (kind := _kind(each))), "")


def _kind(address: Address) -> str:
    for kind in _KINDS:
        if getattr(address, "is_" + kind):
            return kind.replace("_", "-")
    # Shared address space (100.64.0.0/10), documentation, benchmarking and the like.
    return "" if address.is_global else "not public"


def _targets(address: Address) -> Iterator[Address]:
    """The addresses that a packet to `address` may end up at."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
    elif address.ipv4_mapped:
        yield address.ipv4_mapped
    elif address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    elif address.sixtofour:  # newer Pythons call all of them private, whatever they carry
        yield address.sixtofour
    else:
        yield address
        yield from address.teredo or ()
