import threading
import time
from functools import partial

import pytest

from vit_jax.interrupt import CUT, DONE, CutError, FirstCalls, Interrupt, Reader


def stop_soon(stopped):
    threading.Timer(0.05, stopped.append, [15]).start()


def test_a_call_returns_and_raises_as_if_it_were_made_here():
    assert Interrupt([]).unless(max, 3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        Interrupt([]).unless(lambda: 1 / 0)


def test_a_signal_ends_the_waiting_for_a_long_call():
    stopped, free, began = [], threading.Event(), time.monotonic()
    stop_soon(stopped)
    with pytest.raises(CutError):
        Interrupt(stopped).unless(free.wait, 60)
    assert time.monotonic() - began < 5
    free.set()


class Both:
    """A meeting of two in one process, of which one may never come."""

    seconds = 0.001

    def __init__(self):
        self.there, self.words = [], []

    def arrive(self):
        self.there.append(threading.get_ident())

    def full(self):
        return len(self.there) == 2

    def say(self, word):
        self.words.append(word)

    def word(self):
        return next(iter(self.words), None)


def of_two(came, other, function):
    """What each of two gets, "cut" for one that is cut short; the other was asked to stop."""
    meeting, got = Both(), {}

    def body(name, stopped, function):
        try:
            got[name] = Interrupt(stopped, lambda: meeting).unless(function)
        except CutError:
            got[name] = "cut"

    threads = [
        threading.Thread(target=body, args=("one", came, function)),
        threading.Thread(target=body, args=("other", other, lambda: 2)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return got, meeting


def test_a_call_that_two_processes_make_is_done_in_both():
    got, meeting = of_two([], [], lambda: 1)
    assert got == {"one": 1, "other": 2}
    assert meeting.word() == DONE


@pytest.mark.parametrize("came", [([], [15]), ([15], []), ([15], [15])])
def test_a_signal_to_one_of_two_processes_cuts_their_call_in_both(came):
    free = threading.Event()
    got, meeting = of_two(*came, lambda: free.wait(60))
    assert got == {"one": "cut", "other": "cut"}
    assert meeting.word() == CUT
    free.set()


def test_one_whose_call_is_done_waits_for_the_other_and_may_still_be_asked_to_stop():
    stopped, free, began = [], threading.Event(), time.monotonic()
    stop_soon(stopped)
    got, _ = of_two([], stopped, lambda: free.wait(60))
    assert got == {"one": "cut", "other": "cut"}
    assert time.monotonic() - began < 5
    free.set()


def test_two_processes_are_cut_or_go_on_together_at_whatever_moment_the_signal_comes():
    for delay in (0, 0.001, 0.002, 0.004, 0.008):
        stopped = []
        timer = threading.Timer(0.004, stopped.append, [15])
        timer.start()
        got, _ = of_two([], stopped, partial(time.sleep, delay))
        timer.join()
        assert ("cut" in got.values()) == (got == {"one": "cut", "other": "cut"})


def test_an_error_of_one_process_is_not_waited_with():
    meeting = Both()
    with pytest.raises(ZeroDivisionError):
        Interrupt([], lambda: meeting).unless(lambda: 1 / 0)


class Compiled:
    """A function that counts its calls, and what it compiled before."""

    def __init__(self):
        self.compiled, self.called = [], []

    def compile(self, *_):
        self.compiled.append(threading.current_thread().name)

    def __call__(self, *_):
        self.called.append(threading.current_thread().name)


def test_only_what_compiles_runs_in_another_thread_once_for_each_shape():
    function = Compiled()
    step = FirstCalls(function, Interrupt([]))
    for rows in ([1], [1], [1, 2], [1]):
        step({}, {"image": memoryview(bytes(rows))})
    assert function.compiled == ["compiling"] * 2
    assert function.called == ["MainThread"] * 4


def test_a_reader_gives_what_the_iterator_gives_and_closes_it():
    closed = []

    def numbers():
        try:
            yield from range(3)
        finally:
            closed.append(threading.current_thread().name)

    assert list(Reader(numbers(), Interrupt([]))) == [0, 1, 2]
    reader = Reader(numbers(), Interrupt([]))
    assert next(reader) == 0
    reader.close()
    assert closed == ["reading", "reading"]


def test_a_reader_passes_errors_on():
    def broken():
        yield 1
        raise OSError("gone")

    reader = Reader(broken(), Interrupt([]))
    assert next(reader) == 1
    with pytest.raises(OSError, match="gone"):
        next(reader)


def test_a_signal_ends_the_waiting_for_a_reader():
    stopped, free, began = [], threading.Event(), time.monotonic()

    def stuck():
        free.wait(60)
        yield 1

    reader = Reader(stuck(), Interrupt(stopped))
    stop_soon(stopped)
    with pytest.raises(CutError):
        next(reader)
    reader.close()
    assert time.monotonic() - began < 5
    free.set()


def test_two_processes_wait_for_the_first_item_together_and_not_for_the_next():
    meetings = []

    def meet():
        meetings.append(Both())
        meetings[-1].there.append("the other")
        return meetings[-1]

    assert list(Reader((x for x in "abc"), Interrupt([], meet))) == ["a", "b", "c"]
    assert len(meetings) == 1


def test_what_the_other_process_was_asked_ends_the_waiting_for_the_first_item():
    free = threading.Event()

    def stuck():
        free.wait(60)
        yield 1

    meeting = Both()
    reader = Reader(stuck(), Interrupt([], lambda: meeting))
    threading.Timer(0.05, meeting.say, [CUT]).start()
    with pytest.raises(CutError):
        next(reader)
    reader.close()
    free.set()
