"""Checks that hosts answer, with a time limit that also covers name resolution."""

from __future__ import annotations

import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable


def _address(url: str) -> tuple[str, int] | None:
    """The (host, port) to connect to for a URL, which are those of the proxy if one is set."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def unreachable_host(urls: Iterable[str], timeout: float = 1.5) -> str | None:
    """The first host that we cannot connect to in time.

    Args:
      urls: URLs to download from.
      timeout: In seconds, for all hosts together.

    Returns:
      The name of the host, or None if all hosts answer.
    """
    # Name resolution can block for minutes and cannot be interrupted. So each connection is made in
    # a daemon thread, which we stop waiting for when the time is up.
    addresses = list(dict.fromkeys(a for a in map(_address, urls) if a is not None))
    answered = set()

    def connect(address: tuple[str, int]) -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
        except OSError:
            return
        answered.add(address)

    threads = [threading.Thread(target=connect, args=(a,), daemon=True) for a in addresses]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return next((host for host, port in addresses if (host, port) not in answered), None)
