"""How signals and a failed standard output ask a program to end."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

from utils import ToolkitError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised to obey the signal `signum`; its text is one sentence."""

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Output:
    """Standard output that may fail: the disk is full, or the reader of a pipe has ended.

    After the first failed write later output is discarded and the run is asked to end, as by a
    signal; outside `StopRequests` the write raises BrokenPipeError where a reader has ended, else
    ToolkitError. `failure` is the message.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure = ""
        self.stop: StopRequests | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            # The buffered text would fail again as the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self.failure = (
                f"standard output takes no more ({os.strerror(error.errno)}): send it to a place "
                "with room"
            )
            if self.stop is None and isinstance(error, BrokenPipeError):
                raise
            if self.stop is None:
                raise ToolkitError(self.failure) from error
            self.stop.output_failed(self.failure)
            return len(text)


class StopRequests:
    """Within this context SIGINT, SIGTERM and SIGHUP ask a run to end without interrupting it.

    An `Output` that fails does the same, as SIGPIPE. The handlers only note the signal, so that
    nothing is left half done; `check` obeys it. A second SIGINT interrupts the run with
    KeyboardInterrupt. A signal that is ignored, as under nohup, stays ignored. `agree` combines the
    signal noted here with those of other processes; 0 is none.
    """

    def __init__(self, agree: Callable[[int], int] = lambda signum: signum) -> None:
        self._agree = agree
        self._noted = 0
        self._failure = ""
        self._interrupts = 0
        self._ending = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        # Python lets only the main thread handle signals.
        for signum in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._old[signum] = signal.signal(signum, self._note)
        if isinstance(sys.stdout, Output):
            sys.stdout.stop = self
        return self

    def __exit__(self, *exc: object) -> None:
        if isinstance(sys.stdout, Output):
            sys.stdout.stop = None
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old.clear()

    def check(self) -> None:
        """Raise Stopped if a signal has arrived since the last obeyed one."""
        signum = self._agree(self._noted)
        if signum:
            self._noted = 0
            self._ending = True
            raise Stopped(signum, self._failure if signum == signal.SIGPIPE else "")

    def output_failed(self, failure: str) -> None:
        """Ask the run to end; `failure` is the reason in one sentence."""
        self._failure = failure
        self._noted = signal.SIGPIPE

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            if self._ending:
                # The other processes have already obeyed this signal; it arrived late here.
                return
        self._noted = signum
