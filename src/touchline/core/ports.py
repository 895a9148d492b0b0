"""Addresses that servers listen on."""

import errno
import socket
from contextlib import suppress
from ipaddress import ip_address

from touchline.core.errors import TouchlineError


def bound(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket that reserves an address without listening; closing it frees the address.

    Args:
        option: of the command line, which chooses the port.

    Raises:
        TouchlineError: another program has it, or it is none of this machine's.
    """
    holding = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holding.bind((host, port))
    except OSError as error:
        holding.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise TouchlineError(
                f"{host} is no address of this machine ({error.strerror}): choose another --host, 127.0.0.1 or 0.0.0.0"
            ) from None
        raise TouchlineError(f"{host}:{port} is not free ({error.strerror}): choose another {option}") from None
    return holding


def trusted_hosts(host: str, port: int) -> list[str]:
    """Host headers that requests to a server on a loopback address have; empty for any other address.

    A web page whose name points to this machine (DNS rebinding) sends its own name instead.
    """
    if not ip_address(host if ":" in host else socket.gethostbyname(host)).is_loopback:
        return []
    names = dict.fromkeys((f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"))
    return [name if port == 80 else f"{name}:{port}" for name in names]


def url(host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - every address, compared with
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def allow_open_files(needed: int) -> None:
    """Raise the limit of this process's open files, connections among them and often 1,024, as far as is allowed."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < needed:  # a negative number is no limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))
