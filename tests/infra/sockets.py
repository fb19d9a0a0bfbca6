"""Which sockets does a process, with everything below it, listen on?"""

from __future__ import annotations

import contextlib
import ipaddress

import psutil


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def listening(processes: list[psutil.Process]) -> dict[str, str]:
    """address:port -> process, for every TCP socket that listens and every bound UDP socket."""
    found: dict[str, str] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for entry in process.net_connections(kind="inet"):
                if entry.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and entry.laddr:
                    found[f"{entry.laddr.ip}|{entry.laddr.port}"] = f"{process.name()} {process.pid}"
    return found


def beyond_loopback(found: dict[str, str]) -> dict[str, str]:
    return {place: who for place, who in found.items() if not _is_loopback(place.split("|")[0])}


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
