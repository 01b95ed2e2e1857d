"""A process that a bench asks says what is wrong, also by dying."""

import os

import pytest

from engrammar_lab.bench.asking import asking


def divider(first):
    assert first, "nothing to begin with"

    def answer(number):
        if number == 0:
            os._exit(7)
        return [*first, 60 // (number - 1)]

    return answer


def test_questions_are_answered_one_after_the_other_and_a_failure_is_not_the_end():
    with asking("the divider", divider, [1]) as ask:
        assert [ask(2), ask(5)] == [[1, 60], [1, 15]]
        with pytest.raises(ChildProcessError, match="the divider failed at 1: ZeroDivisionError"):
            ask(1)
        assert ask(3) == [1, 30]


def test_a_process_that_dies_is_named_with_its_exit_status():
    with asking("the divider", divider, [1]) as ask:
        for _ in range(2):
            with pytest.raises(ChildProcessError, match=r"The process of the divider has died \(exit status 7\)"):
                ask(0)


def test_so_is_one_that_cannot_begin():
    died = pytest.raises(ChildProcessError, match=r"the divider has died \(exit status 1\)")
    with died, asking("the divider", divider, []):
        pass
