"""Watch the connections that httpx makes for one try: how long they are silent, and where they lead.

httpx's time-outs are for a single read: a server that drips its status line, headers or chunk sizes would
never meet them. Nor does it mind being redirected into the network that this machine is in.
"""

import ipaddress
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from mdl_toolkit.i18n import Localized


class PrivateAddressError(Exception):
    """Refuse to connect to a private address."""


class ConnectionWatch:
    """Cut off connections over which nothing comes; a context for one try, and the callback of httpx's trace.

    Args:
        patience: seconds for an answer's head, and between two pieces of its body.
        ends: when, by the monotonic clock, all must be over.

    Attributes:
        is_cut: connections were cut off.
        proxy: host and port of the proxy through which the host that is asked was reached, or nothing.
    """

    def __init__(self, patience: float, ends: float) -> None:
        self.is_cut, self.proxy = False, ""
        self._patience, self._ends = patience, ends
        self._until = ends
        self._over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._host = ""
        # Whether the first address is private: then redirections may be, too.
        self._may_be_private: bool | None = None

    def __enter__(self) -> "ConnectionWatch":
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for connection in self._sockets:
            connection.close()

    def _wait(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            # Half a second at most, as the end may come nearer in the meantime.
            if self._over.wait(min(left, 0.5)):
                return
        self.is_cut = True
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def renew(self) -> None:
        """Note a sign of life."""
        self._until = min(self._ends, time.monotonic() + self._patience)

    def ask(self, host: str) -> None:
        """Note the host that is asked next."""
        self._host = host
        self.renew()

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Note what httpx does; see its extension `trace`.

        Raises:
            PrivateAddressError: a redirection leads from a public address to a private one.
        """
        if event.endswith("connect_tcp.started"):
            is_proxy = info["host"] != self._host
            self.proxy = f"{info['host']}:{info['port']}" if is_proxy else ""
        elif event.endswith("connect_tcp.complete"):
            stream = info["return_value"]
            # A duplicate, as TLS takes the original over.
            self._sockets.append(stream.get_extra_info("socket").dup())
            self.renew()
            is_private = _is_private(self._host if self.proxy else stream.get_extra_info("server_addr")[0])
            if self._may_be_private is None:
                self._may_be_private = is_private
            if is_private and not self._may_be_private:
                stream.close()
                raise PrivateAddressError
        if self.is_cut:
            raise TimeoutError


def _is_private(host: str) -> bool:
    """Tell whether an address, or a name, is of this machine or of a private network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return f".{host.lower()}".endswith(".localhost")
    return not (getattr(address, "ipv4_mapped", None) or address).is_global


PRIVATE_TARGET = Localized(
    "it redirects from a public address to one of this machine or its private network, which is refused; if "
    "that is meant, give the private address in the CSV"
)
