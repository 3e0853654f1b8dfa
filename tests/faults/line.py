"""A network line that can be cut: a TCP forwarder of the test's own, which needs no rights and no tools.

While it is cut nothing passes in either direction and nobody is told, as when a cable is pulled: bytes that were sent
wait, new connections are accepted by nobody. When it is mended, what waited goes on its way, if it is still wanted.
"""

import selectors
import socket
import threading
from contextlib import suppress

PIECE = 65536


class Line:
    """From a free port of this machine to ``target`` (host:port)."""

    def __init__(self, target):
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._passes, self._stopped = threading.Event(), threading.Event()
        self._passes.set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self):
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self):
        self._passes.clear()

    def mend(self):
        self._passes.set()

    def close(self):
        self._stopped.set()
        self._passes.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while not self._stopped.is_set():
            self._passes.wait()
            try:
                own, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(own,), daemon=True).start()

    def _forward(self, own):
        self._passes.wait()
        try:
            other = socket.create_connection(self._target, timeout=30)
        except OSError:
            own.close()
            return
        other.settimeout(None)
        with own, other, selectors.DefaultSelector() as ready, suppress(OSError):
            ready.register(own, selectors.EVENT_READ, other)
            ready.register(other, selectors.EVENT_READ, own)
            while not self._stopped.is_set():
                for key, _ in ready.select(timeout=0.5):
                    self._passes.wait()
                    data = key.fileobj.recv(PIECE)
                    if not data:
                        return
                    key.data.sendall(data)
