"""torch's own OpenMP threads."""

from __future__ import annotations

from leanmoe.kernels.cpu import threads


def test_a_function_that_no_library_has_is_none() -> None:
    assert threads.openmp_functions("omp_get_thread_num", "leanmoe_has_no_such_function") == ()


def test_both_functions_of_a_team_have_addresses() -> None:
    team = threads.find_team()
    assert team is None or (team.parallel and team.thread_number)
