"""docs/recipes.md: its code runs, and gives what the packages give that it is for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SB3, TORCHRL = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
B, T, I, H = 6, 40, 8, 64


def run(code: str) -> dict:
    namespace: dict = {}
    exec(compile(code, "recipes.md", "exec"), namespace)
    return namespace


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def episodes():
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.1
    assert begins[:, 1:].any()
    return begins


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_policy_of_sb3_contrib_learns_with_one_scan_in_place_of_its_loop():
    pytest.importorskip("sb3_contrib")
    policy = run(SB3)["model"].policy
    assert isinstance(policy.lstm_actor, fastrnn.LSTM)
    theirs = nn.LSTM(I, H)
    ours = fastrnn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x, starts = random(B * T, I), episodes().flatten().float()
    states = (random(1, B, H), random(1, B, H) / 2)
    base = type(policy).__mro__[1]
    found = []
    for process, lstm in ((type(policy)._process_sequence, ours), (base._process_sequence, theirs)):
        y, last = process(x, states, starts, lstm)
        found.append((y, last, torch.autograd.grad(y.square().sum(), list(lstm.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_module_of_torchrl_scans_whole_rows():
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    ours = run(TORCHRL)["module"]
    theirs = LSTMModule(lstm=nn.LSTM(I, H, batch_first=True), in_keys=ours.in_keys, out_keys=ours.out_keys)
    theirs.lstm.load_state_dict(ours.lstm.state_dict())
    begins = episodes()
    stored = [random(B, T, 1, H) * ~begins[:, :, None, None] for _ in range(2)]
    found, ends = [], torch.cat((begins[:, 1:], torch.ones(B, 1, dtype=torch.bool)), 1)
    for module in (ours, theirs):
        data = {"x": random(B, T, I), "h": stored[0], "c": stored[1], "is_init": begins[..., None]}
        with set_recurrent_mode(True):
            result = module(TensorDict(data, [B, T]))
        y, h, c = (result[key] for key in ours.out_keys)
        gradients = torch.autograd.grad(y.square().sum(), list(module.lstm.parameters()))
        found.append((y, h[ends], c[ends], gradients))  # torchrl has zeros for the states inside an episode
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    one_step = {"x": random(B, I), "h": stored[0][:, 0], "c": stored[1][:, 0], "is_init": begins[:, :1]}
    steps = [module(TensorDict(one_step, [B]))["y"] for module in (ours, theirs)]
    torch.testing.assert_close(*steps)
