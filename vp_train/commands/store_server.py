"""A TCPStore in a process of its own, so that the agent that needs it stays free of threads.

An agent forks ranks, and starts them again after a failure; a process with threads must not fork.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Mapping

from vp_train.commands.local_ranks import child
from vp_train.commands.titles import entitle
from vp_train.config import ConfigError
from vp_train.failures import end_of_process

LOOPBACK_ADDRESS = "127.0.0.1"
_LOOPBACK = "lo"


class StoreServer:
    """A running store at `port`, with `values` in it.  It ends with this process, or by `close`."""

    def __init__(
        self,
        address: str = LOOPBACK_ADDRESS,
        port: int = 0,
        values: Mapping[str, str] | None = None,
    ) -> None:
        """Serve on `address`, "" for every interface, and on a free port if `port` is 0.

        Raises OSError if the port is in use, or if the system has no more of something.
        """
        family = (
            socket.AF_INET6 if address == "" and socket.has_dualstack_ipv6() else socket.AF_INET
        )
        listening = socket.create_server(
            (address, port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
        self.port: int = listening.getsockname()[1]
        self._process = child(lambda: _serve(listening, self.port, values or {}))
        listening.close()

    @classmethod
    def at_port(
        cls,
        address: str,
        port: int,
        who: str,
        way_out: str,
        values: Mapping[str, str] | None = None,
    ) -> StoreServer:
        """Serve at a port that users can change: `who` does, and `way_out` says how to change it.

        Raises ConfigError if the port is in use or not allowed, and OSError for what another start
        may mend.
        """
        try:
            return cls(address, port, values)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            words = f"{who} cannot listen at port {port} ({os.strerror(error.errno)})"
            raise ConfigError(f"{words}{way_out}") from None

    def poll(self) -> str | None:
        """Return in words how the store has ended since the last call, None if it has not."""
        if not self._process:
            return None
        process, status = os.waitpid(self._process, os.WNOHANG)
        if not process:
            return None
        self._process = 0
        return end_of_process(os.waitstatus_to_exitcode(status))

    def has_ended(self) -> bool:
        """Return whether the store has ended."""
        return self.poll() is not None or not self._process

    def close(self) -> None:
        """End the store."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0


def _serve(listening: socket.socket, port: int, values: Mapping[str, str]) -> None:
    """Serve the store until this process is killed."""
    entitle("vp store")
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        LOOPBACK_ADDRESS,
        port,
        None,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    for key, value in values.items():
        store.set(key, value)
    while True:
        time.sleep(3600)


def loopback() -> dict[str, str]:
    """Return the settings that keep gloo and NCCL on the loopback interface, where there is one."""
    if _LOOPBACK not in (name for _, name in socket.if_nameindex()):
        return {}
    return {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
