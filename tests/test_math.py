"""The insides, through csrc/testing: how exact sigmoid, tanh, exp and log(sigmoid) are, and that a Team
always finishes.

``python tests/accuracy.py`` prints the errors that are bounded here.
"""

import random

import accuracy
import mpmath
import numpy as np
import pytest
from accuracy import FUNCTIONS, TYPES

ISAS = ("avx512", "avx2", "baseline")
BOUND = {"sigmoid": 2.5, "tanh": 3.5, "exp": 1.5, "log_sigmoid": 3.6}  # ulp; measured 2.4, 3.2, 1.2, 3.5
CORNERS = {  # at -inf, -1e30, -0, 0, 1e30, inf; NaN where the value is no number of the type
    "sigmoid": [0, 0, 0.5, 0.5, 1, 1],
    "tanh": [-1, -1, 0, 0, 1, 1],
    "exp": [0, 0, 1, 1, np.inf, np.inf],
    "log_sigmoid": [-np.inf, -1e30, np.nan, np.nan, 0, 0],
}


@pytest.fixture(params=ISAS)
def isa(request, internals):
    if request.param not in internals.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_error_is_bounded_over_the_whole_range(internals, isa, function, dtype):
    x = accuracy.sample(dtype, count=300_000)
    found = accuracy.measure(getattr(internals, function)(isa, x), x, function)
    assert found.ulp <= BOUND[function], found
    # sigmoid of a large negative number may become zero a little early, as in torch.
    assert found.below_normal <= 0.26, found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_corners_are_exact(internals, isa, function, dtype):
    inf, zero = dtype(np.inf), dtype(0)
    f = getattr(internals, function)
    x = np.array([-inf, -1e30, -zero, zero, 1e30, inf], dtype=dtype)
    expected = np.array(CORNERS[function], dtype=dtype)
    exact = ~np.isnan(expected)
    np.testing.assert_array_equal(f(isa, x[exact]), expected[exact])
    nan = np.array([np.nan, -np.nan], dtype=dtype)
    assert np.isnan(f(isa, nan)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_tanh_of_a_denormal_number_is_the_number(internals, isa, dtype):
    x = (np.arange(-1000, 1000) * np.finfo(dtype).smallest_subnormal).astype(dtype)
    np.testing.assert_array_equal(internals.tanh(isa, x), x)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_values_stay_inside_their_bounds_and_keep_their_sign(internals, isa, function, dtype):
    x = accuracy.sample(dtype, count=100_000)
    y = getattr(internals, function)(isa, x)
    if function == "sigmoid":
        assert ((y >= 0) & (y <= 1)).all()
    elif function == "exp":
        assert (y >= 0).all()
    elif function == "log_sigmoid":
        assert (y <= 0).all()
    else:
        assert ((np.abs(y) <= 1) & (y * np.sign(x) >= 0)).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_lane_does_not_see_its_neighbours(internals, isa, function, dtype):
    f = getattr(internals, function)
    x = np.random.default_rng(0).normal(0, 3, 37).astype(dtype)
    whole = f(isa, x)
    for count in range(1, 37):
        np.testing.assert_array_equal(f(isa, x[:count]), whole[:count])
    x[7], x[11] = np.nan, np.inf
    poisoned = f(isa, x)
    kept = np.delete(np.arange(37), [7, 11])
    np.testing.assert_array_equal(poisoned[kept], whole[kept])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_measuring_stick_itself_is_true(function):
    """Long double against 50 digits."""
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("long double is no wider than double here")
    mpmath.mp.dps = 50
    exact = {
        "tanh": mpmath.tanh,
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "exp": mpmath.exp,
        "log_sigmoid": lambda v: -mpmath.log1p(mpmath.exp(-v)),
    }[function]
    x = accuracy.sample(np.float64, count=100, seed=1)
    x = x[(np.abs(x) < 700) & (np.abs(x) > 1e-300)]
    for value, measured in zip(x[:400], accuracy.truth(function, x[:400]), strict=True):
        wanted = exact(mpmath.mpf(float(value)))
        high = float(measured)
        low = float(measured - np.longdouble(high))
        error = abs((mpmath.mpf(high) + mpmath.mpf(low) - wanted) / wanted)
        assert error < 2e-18, value  # 1/100 of an ulp of double


# ---- Team: never a deadlock, whoever comes late or not at all ------------------------------------------


def run_team(internals, parts, phases, members, one_thread=False, stall_every=0, seed=0, tick_us=0):
    made = [internals.Member(part, late) for part, late in members]
    return internals.run_team(parts, phases, made, one_thread, stall_every, seed, tick_us)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 128])
def test_one_member_alone_does_the_work_of_all(internals, parts):
    for part in {0, parts // 2, parts - 1}:
        assert run_team(internals, parts, 20, [(part, 0)]) == ""


@pytest.mark.parametrize("parts", [2, 5])
def test_members_one_after_another_on_one_thread_finish(internals, parts):
    for order in ([*range(parts)], [*reversed(range(parts))]):
        assert run_team(internals, parts, 50, [(p, 0) for p in order], one_thread=True) == ""


def test_no_phases_are_finished_at_once(internals):
    assert run_team(internals, 3, 0, [(0, 0), (1, 0), (2, 0)]) == ""


def test_a_member_that_comes_late_or_after_the_end_finds_the_work_done(internals):
    for late in (0, 100, 3000, 30000):
        assert run_team(internals, 3, 100, [(0, 0), (1, late), (2, 2 * late)]) == ""


def test_members_that_never_come_are_stood_in_for(internals):
    assert run_team(internals, 8, 200, [(2, 0), (5, 100)]) == ""


@pytest.mark.parametrize("tick_us", [0, 10_000], ids=["real_clock", "who_is_late_is_dropped"])
def test_many_random_schedules_finish_and_keep_the_order(internals, tick_us):
    r = random.Random(0)
    for seed in range(300):
        parts = r.choice([1, 2, 2, 3, 4, 9])
        here = r.sample(range(parts), r.randint(1, parts))
        members = [(part, r.choice([0, 0, 0, 50, 500])) for part in here]
        stalls = r.choice([0, 0, 5, 40])
        phases = r.choice([1, 2, 30]) if stalls else r.choice([1, 30, 1000])
        wrong = run_team(internals, parts, phases, members, False, stalls, seed, tick_us)
        assert wrong == "", (parts, phases, members, stalls, seed)


def test_more_members_than_cores_finish(internals):
    assert run_team(internals, 32, 200, [(part, 0) for part in range(32)]) == ""


# ---- Busy machines: a team goes on without members that are descheduled --------------------------------


@pytest.mark.parametrize(("parts", "held"), [(2, 1), (3, 1), (3, 2), (8, 3)])
def test_members_that_stay_in_their_parts_are_dropped_and_the_others_go_on(internals, parts, held):
    found = internals.hold_members(parts, 50, held, phase=5, worked_us=300, waited_us=10_000)
    assert found.wrong == ""
    assert found.late == held
    assert found.done == [True] * (parts - held) + [False] * held
    assert found.after == 0


# Patience: half a millisecond, or half of the time before. One phase of that time is usual, not lost.
@pytest.mark.parametrize(
    ("worked_us", "waited_us", "late"),
    [(600, 550, 0), (600, 800, 1), (60_000, 39_000, 0), (60_000, 42_000, 1)],
)
def test_a_wait_may_take_half_of_the_time_that_was_worked(internals, worked_us, waited_us, late):
    found = internals.hold_members(2, 20, 1, phase=5, worked_us=worked_us, waited_us=waited_us)
    assert found.wrong == ""
    assert found.late == late
    assert found.done == [True, not late]


def test_nobody_waits_for_a_member_that_does_not_claim_its_parts(internals):
    # Spinning for it in each phase would take 20 us each: 2 s.
    assert internals.seconds_without_neighbour(100_000, shared=10) < 0.5


def test_after_contention_teams_are_smaller_for_a_while_that_doubles_and_halves(internals):
    ms = 1_000_000
    memory, now = internals.Contention(), 0

    def small_for(limit):
        """How many ms teams of four have fewer members, and how many they have."""
        nonlocal now
        begun, members = now, memory.members(4)
        while memory.members(4) < 4 and now < begun + limit * ms:
            now += ms
            internals.set_clock(now)
        return (now - begun) // ms, members

    internals.set_clock(now)
    assert memory.members(4) == 4
    memory.report(4, 4, 1)
    assert small_for(100) == (10, 3)
    memory.report(4, 4, 2)
    assert memory.members(4) == 2
    memory.report(4, 2, 1)  # and of these two one was late again
    assert memory.members(2) == memory.members(4) == 1
    memory.report(4, 1, 0)  # which says nothing about four
    assert small_for(100) == (40, 1)
    for _ in range(20):
        memory.report(4, 4, 1)
    assert small_for(5000) == (1280, 3)
    for _ in range(7):
        memory.report(4, 4, 0)
    memory.report(4, 4, 1)
    assert small_for(100) == (20, 3)
    for _ in range(9):
        memory.report(4, 4, 0)
    memory.report(4, 4, 1)
    assert small_for(100) == (10, 3)
