"""Addresses that servers listen on."""

import socket

from touchline.core.errors import TouchlineError


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds an address, and does not listen yet; closing it frees the address.

    Raises:
        TouchlineError: another program has it.
    """
    holding = socket.socket()
    holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holding.bind((host, port))
    except OSError as error:
        holding.close()
        raise TouchlineError(f"{host}:{port} is not free ({error.strerror}): choose another --port") from None
    return holding
