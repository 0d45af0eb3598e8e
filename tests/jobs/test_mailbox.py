"""Messages that gather while others are sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.mailbox import Mailbox


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_all_come_in_order_and_those_that_waited_together(thread: ThreadPoolExecutor) -> None:
    made, taken = threading.Event(), threading.Event()

    def messages() -> Iterator[int]:
        yield 0
        assert taken.wait(10)  # the first goes alone, without waiting for another
        yield from range(1, 100)
        made.set()

    boxes = iter(Mailbox(messages(), thread))
    assert next(boxes) == [0]
    taken.set()
    assert made.wait(10)
    rest = list(boxes)
    assert [i for box in rest for i in box] == list(range(1, 100))
    assert len(rest) == 1


def test_no_more_than_allowed_come_at_once(thread: ThreadPoolExecutor) -> None:
    box = Mailbox(range(10), thread, most=4)
    thread.submit(lambda: None).result(10)  # behind the making of the messages
    assert list(box) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_error_comes_behind_what_was_made_before_it(thread: ThreadPoolExecutor) -> None:
    def messages() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    box = Mailbox(messages(), thread)
    thread.submit(lambda: None).result(10)
    boxes = iter(box)
    assert next(boxes) == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(boxes)


def test_messages_are_made_on_the_thread_that_was_given(thread: ThreadPoolExecutor) -> None:
    at_work = thread.submit(threading.get_ident).result(10)

    def messages() -> Iterator[int]:
        yield threading.get_ident()

    assert list(Mailbox(messages(), thread)) == [[at_work]]
    assert at_work != threading.get_ident()
