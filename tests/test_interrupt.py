import threading
import time

import pytest

from vit_jax.interrupt import CutError, FirstCalls, Reader, unless


def stop_soon(stopped):
    threading.Timer(0.05, stopped.append, [15]).start()


def test_a_call_returns_and_raises_as_if_it_were_made_here():
    assert unless([], max, 3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        unless([], lambda: 1 / 0)


def test_a_signal_ends_the_waiting_for_a_long_call():
    stopped, free, began = [], threading.Event(), time.monotonic()
    stop_soon(stopped)
    with pytest.raises(CutError):
        unless(stopped, free.wait, 60)
    assert time.monotonic() - began < 5
    free.set()


def test_only_the_first_call_for_each_shape_runs_in_another_thread():
    threads = []
    step = FirstCalls(lambda *_: threads.append(threading.current_thread().name), [])
    for rows in ([1], [1], [1, 2], [1]):
        step({}, {"image": memoryview(bytes(rows))})
    assert threads == ["compiling", "MainThread", "compiling", "MainThread"]


def test_a_reader_gives_what_the_iterator_gives_and_closes_it():
    closed = []

    def numbers():
        try:
            yield from range(3)
        finally:
            closed.append(threading.current_thread().name)

    assert list(Reader(numbers(), [])) == [0, 1, 2]
    reader = Reader(numbers(), [])
    assert next(reader) == 0
    reader.close()
    assert closed == ["reading", "reading"]


def test_a_reader_passes_errors_on():
    def broken():
        yield 1
        raise OSError("gone")

    reader = Reader(broken(), [])
    assert next(reader) == 1
    with pytest.raises(OSError, match="gone"):
        next(reader)


def test_a_signal_ends_the_waiting_for_a_reader():
    stopped, free, began = [], threading.Event(), time.monotonic()

    def stuck():
        free.wait(60)
        yield 1

    reader = Reader(stuck(), stopped)
    stop_soon(stopped)
    with pytest.raises(CutError):
        next(reader)
    reader.close()
    assert time.monotonic() - began < 5
    free.set()
