"""run/signals.py and run/save_clock.py: signals are noted and obeyed; when to save."""

import contextlib
import os
import signal
import threading

import pytest

from run.save_clock import SaveClock
from run.signals import Output, Stopped, StopRequests


def test_a_run_outside_of_the_main_thread_handles_no_signals():
    before = signal.getsignal(signal.SIGTERM)
    handlers = []

    def run():
        with StopRequests() as stop:
            stop.check()
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [before]


class Time:
    """A clock that only the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_writes_take_at_most_a_fiftieth_of_the_time():
    time = Time()
    clock = SaveClock(300, time)
    epochs = writes = 0
    began = time.now
    written = 0.0
    while time.now < began + 3000:
        time.now += 1.0
        epochs += 1
        if clock.due_at_epoch_end():
            with clock.writing():
                time.now += 0.5
            writes += 1
            written += 0.5
            assert epochs > 1 or writes == 1
    assert writes > 50
    assert written / (time.now - began) < 0.021


def test_within_an_epoch_by_the_clock_alone():
    time = Time()
    clock = SaveClock(300, time)
    assert clock.due_at_epoch_end()
    assert not clock.due()
    time.now += 300
    assert clock.due()
    with clock.writing():
        time.now += 50
    assert not clock.due()
    # After slow writes, too, a save is due after the interval of 300 s.
    time.now += 300
    assert clock.due_at_epoch_end()


def test_a_failed_write_does_not_count():
    clock = SaveClock(300, Time())
    with pytest.raises(OSError, match="full"), clock.writing():
        raise OSError("full")
    assert clock.due_at_epoch_end()


def test_signals_are_noted_and_obeyed_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM") as stopped:
            stop.check()
        assert stopped.value.signum == signal.SIGTERM
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, old)


def test_ranks_obey_the_same_signal():
    with StopRequests(agree=lambda noted: max(noted, signal.SIGINT)) as stop:
        with pytest.raises(Stopped):
            stop.check()
        # The Ctrl-C that reaches this process later is the same one, not a second one.
        signal.raise_signal(signal.SIGINT)
        assert stop._noted == 0


@pytest.fixture
def broken_pipe():
    """A text stream to a pipe without a reader."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w", buffering=1, encoding="utf-8") as stream:
        yield stream


def test_a_lost_output_ends_a_run_as_a_signal_does(broken_pipe):
    output = Output(broken_pipe)
    with contextlib.redirect_stdout(output), StopRequests() as stop:
        stop.check()
        output.write("one\n")
        output.write("two goes nowhere, and fails no more\n")
        with pytest.raises(Stopped, match="standard output takes no more") as stopped:
            stop.check()
        assert stopped.value.signum == signal.SIGPIPE
        stop.check()
    assert output.failure


def test_a_lost_output_with_nothing_to_save(broken_pipe):
    output = Output(broken_pipe)
    with contextlib.redirect_stdout(output), StopRequests():
        pass
    with pytest.raises(BrokenPipeError):  # it ends the script silently
        output.write("one\n")
