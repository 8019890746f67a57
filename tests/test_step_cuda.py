"""The options that act on the states between steps on the CUDA kernels, which run on the CPU: the tests of
the CPU's kernels once more."""

import pytest
from test_cuda import host_kernels
from test_step_options import (  # noqa: F401  (collected here too)
    module,
    test_batch_first_and_unbatched_calls_have_the_same_masks,
    test_each_option_follows_its_paper_with_gradients,
    test_nothing_in_the_padding_reaches_a_derivative,
    test_packed_sequences,
    test_pairs_of_options_and_all_at_once_follow_their_papers,
    test_reset_to_sets_the_states_with_their_gradient,
)

pytestmark = pytest.mark.filterwarnings("error:fastrnn")


@pytest.fixture(autouse=True)
def cuda_kernels(on_host, monkeypatch):
    host_kernels(monkeypatch)
