"""Signals as requests: the first is heard, the next has its usual effect, and all is as before in the end."""

import os
import signal
import threading
from contextlib import suppress

import pytest

from mdl_toolkit.utils import signals as stopping
from mdl_toolkit.utils.signals import Interruption, StopRequest
from tests.support.processes import wait_for
from tests.support.runs import STOPPING

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


@BOTH
def test_the_first_signal_is_a_request_and_a_later_one_has_its_usual_effect(number, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.0)
    came = []
    before = signal.signal(number, lambda *_: came.append(number))
    try:
        with StopRequest() as request:
            assert not request.is_made
            os.kill(os.getpid(), number)
            wait_for(lambda: request.is_made)
            assert not came
            os.kill(os.getpid(), number)
            wait_for(lambda: came)
        os.kill(os.getpid(), number)
        wait_for(lambda: len(came) == 2)
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err.splitlines() == [STOPPING]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_later_signal_that_was_ignored_before_interrupts(number, monkeypatch):
    """Otherwise what a script starts with `&` would say that once more stops at once, and go on."""
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.0)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), number)
            wait_for(lambda: request.is_made)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_what_a_launcher_passes_on_is_the_same_request(capsys):
    """A scheduler or terminal signals all processes, and a launcher among them hands it to the others."""
    with StopRequest() as request:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            wait_for(lambda: request.is_made)
    assert capsys.readouterr().err.splitlines() == [STOPPING]


@BOTH
def test_what_a_launcher_passes_on_after_the_end_is_the_same_request(number, monkeypatch):
    came = []
    before = signal.signal(number, hear := lambda *_: came.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), Interruption():
            signal.raise_signal(number)
        signal.raise_signal(number)
        assert not came
        monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.0)
        signal.raise_signal(number)
        assert came == [number]
        assert signal.getsignal(number) is hear
    finally:
        signal.signal(number, before)


def test_an_interruption_that_a_callback_swallowed_is_not_lost(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.0)
    stopping.raise_if_interrupted()
    with Interruption():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stopping.raise_if_interrupted()
    stopping.raise_if_interrupted()


def test_all_is_as_before_afterwards():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_in_another_thread_signals_are_left_alone():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    seen = []

    def enter():
        with StopRequest() as request:
            seen.append(request.is_made)
            seen.append([signal.getsignal(number) for number in stopping.SIGNALS] == before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_a_hangup_that_is_ignored_stays_so(monkeypatch):
    """As under nohup, which is asked for so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.is_made
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
