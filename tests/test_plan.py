"""How the work of a scan is shared out, for machines that are not here: choose_plan at 1 to 64 threads."""

import pytest
import torch

import fastrnn  # noqa: F401  (registers cpu_plan)

# T, B, H, gates; I = H
SHAPES = [
    (100, 32, 128, 4), (100, 64, 256, 4), (50, 64, 512, 4), (50, 32, 1024, 4), (200, 16, 64, 4),
    (100, 1, 256, 4), (50, 1, 1024, 4), (25, 4, 512, 4), (35, 20, 650, 4), (25, 32, 2048, 4),
    (187, 1, 1536, 3), (187, 32, 1536, 3), (50, 64, 1760, 1), (672, 1, 32, 1), (1, 1, 320, 4),
    (1, 64, 1024, 4),
]  # fmt: skip
THREADS = [1, 2, 3, 8, 16, 31, 64]


@pytest.fixture
def plan():
    before = torch.get_num_threads()

    def ask(threads, T, B, H, gates, D=1):
        torch.set_num_threads(threads)  # starts none
        return torch.ops.fastrnn.cpu_plan(T, B, H, H, gates, D, 4, 4)

    yield ask
    torch.set_num_threads(before)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worker_is_without_a_thread_or_without_work(plan, shape, D):
    _, B, H, _ = shape
    for threads in THREADS:
        teams, parts = plan(threads, *shape, D)
        assert teams * parts <= max(1, threads // D)
        assert 1 <= teams <= B
        assert 1 <= parts <= -(-H // 8)  # no block has fewer than eight units


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] * s[2] ** 2 * s[3] > 2e8], ids=str)
def test_large_scans_use_most_threads(plan, shape):
    for threads in (2, 8, 16, 32):
        teams, parts = plan(threads, *shape)
        assert teams * parts > threads // 2, (threads, teams, parts)


@pytest.mark.parametrize("threads", THREADS)
def test_what_takes_a_moment_stays_on_one_thread(plan, threads):
    assert plan(threads, 1, 1, 128, 4) == [1, 1]
    assert plan(threads, 672, 1, 32, 1) == [1, 1]


@pytest.mark.parametrize("threads", THREADS[1:])
def test_small_weights_are_shared_by_rows_and_one_row_by_units(plan, threads):
    teams, parts = plan(threads, 200, 64, 64, 4)
    assert teams > 1
    assert parts <= 2
    teams, parts = plan(threads, 50, 1, 1024, 4)
    assert teams == 1
    assert parts > min(threads, 1024 // 32) // 2  # blocks have at most 32 units


def test_many_threads_share_rows_and_units(plan):
    for T, B, H in ((50, 64, 512), (50, 512, 512), (100, 64, 256)):
        teams, parts = plan(64, T, B, H, 4)
        assert teams > 1
        assert parts > 1
