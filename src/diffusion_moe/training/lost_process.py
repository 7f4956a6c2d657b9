"""The end of this process when another one has ended, also while it waits for its device.

Under gloo a collective fails as soon as a process has ended. Under NCCL the device waits for the ended process, and the
host for the device, until the time limit of the process group. So every process has a connection to the main one, which
the operating system closes when a process ends, and a thread watches it: torch waits without Python's lock
(THCPEvent_synchronize releases it).
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ..distributed import from_main, is_main, world_size
from .signals import leave

GRACE_SECONDS = 5.0
"""Time in which this process may end by an error of its own, which explains more."""
CONNECT_SECONDS = 5.0
"""Longest wait for a connection, and for its first message."""
GOODBYE = b"."
"""Sent by a process that has nothing more to do with the others."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A machine that does not answer for 25 s is lost. macOS has other names, and keeps its defaults."""


class _Invitation(NamedTuple):
    """Data with which a process connects to the main one."""

    host: str
    port: int
    secret: bytes
    """Sent first, so that a stranger's connection does not count."""


@contextmanager
def ending_with_others() -> Iterator[None]:
    """End this process with one line and status 1 if another one ends inside this context.

    All processes enter it together, and may leave it at different times. A process that hangs is not noticed: the
    system keeps its connection.
    """
    if world_size() == 1:
        yield
        return
    server, own = _listen() if is_main() else (None, None)
    watch = _Watch(server, from_main(own))
    try:
        yield
    except BaseException:
        watch.close()  # without a goodbye: the others must end too
        raise
    watch.close(GOODBYE)


def _listen() -> tuple[socket.socket, _Invitation] | tuple[None, None]:
    """A socket on the address that other machines reach; None if there is none, and then nothing is watched."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))  # nothing is sent
            host = probe.getsockname()[0]
        server = socket.create_server((host, 0), backlog=world_size())
    except OSError:
        return None, None
    return server, _Invitation(host, server.getsockname()[1], uuid.uuid4().bytes)


def _first_message(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer if the other side is silent or closes."""
    message = b""
    with suppress(OSError):
        while len(message) < size:
            part = connection.recv(size - len(message))
            if not part:
                break
            message += part
    return message


class _Watch:
    """A thread that ends this process when a connection ends without a goodbye."""

    def __init__(self, server: socket.socket | None, invitation: _Invitation | None) -> None:
        self.server, self.invitation = server, invitation
        self.connections: list[socket.socket] = []
        self.selector = selectors.DefaultSelector()
        self.closing = threading.Event()
        self.woken, self.waker = socket.socketpair()
        self.selector.register(self.woken, selectors.EVENT_READ)
        if server is not None:
            self.selector.register(server, selectors.EVENT_READ)
        elif invitation is not None:
            with suppress(OSError):  # a firewall: this process is not watched
                connection = socket.create_connection(invitation[:2], CONNECT_SECONDS)
                connection.sendall(invitation.secret)
                self._add(connection)
        self.thread = threading.Thread(target=self._run, name="lost process", daemon=True)
        self.thread.start()

    def close(self, last_words: bytes = b"") -> None:
        """Stop the thread, and close all connections after these words."""
        self.closing.set()
        self.waker.send(b".")
        self.thread.join()
        for connection in self.connections:
            with suppress(OSError):
                connection.sendall(last_words)
        self._close_connections()
        for end in (self.woken, self.waker, self.server, self.selector):
            if end is not None:
                end.close()

    def _run(self) -> None:
        if self._is_one_lost():
            self._close_connections()  # so that the others notice at once
            if not self.closing.wait(GRACE_SECONDS):
                leave(1, "another process ended or cannot be reached; see its messages")

    def _is_one_lost(self) -> bool:
        """Wait until another process is lost; False when this one is done."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.woken:
                    return False
                if key.fileobj is self.server:
                    self._accept()
                elif self._has_left(key.fileobj):  # type: ignore[arg-type]
                    self.selector.unregister(key.fileobj)
                else:
                    return True

    def _has_left(self, connection: socket.socket) -> bool:
        """True if a connection that can be read has said goodbye; else its process is lost."""
        try:
            return connection.recv(1) == GOODBYE
        except OSError:
            return False

    def _accept(self) -> None:
        assert self.server is not None and self.invitation is not None
        connection, _ = self.server.accept()
        connection.settimeout(CONNECT_SECONDS)
        if _first_message(connection, len(self.invitation.secret)) == self.invitation.secret:
            self._add(connection)
        else:
            connection.close()

    def _add(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connections.append(connection)
        self.selector.register(connection, selectors.EVENT_READ)

    def _close_connections(self) -> None:
        for connection in self.connections:
            connection.close()
