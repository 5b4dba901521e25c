import os
import threading

import pytest
import torch

from lskd_study.base.cores import over_cores

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)


def test_as_many_are_at_work_as_there_are_cores_and_come_in_their_order():
    both = threading.Barrier(2, timeout=60)

    def work(number):
        both.wait()
        return number, torch.get_num_threads()

    assert list(over_cores(work, range(4))) == [(number, 1) for number in range(4)]


def test_no_more_is_begun_than_one_for_each_thread_and_one_besides():
    begun = []
    found = over_cores(lambda number: number, (begun.append(number) or number for number in range(9)))
    assert next(found) == 0
    assert begun == [0, 1, 2]
    assert list(found) == list(range(1, 9))


def test_the_first_error_is_raised_and_threads_stay_as_they_were():
    later, own = threading.Event(), torch.get_num_threads()

    def work(number):
        if number == 1:
            later.wait(60)
        later.set()
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        list(over_cores(work, [1, 2]))
    assert torch.get_num_threads() == own
