"""How far back does the gradient of one loss reach? RNN, GRU and LSTM, before any training.

Writes ``gradient_flow.png``: the norm of dL/dh_t for a loss at the last of 100 steps.
"""

import torch

import fastrnn
from fastrnn.training import StateGradientNorms, plots
from fastrnn.training.gradient_flow import describe

torch.manual_seed(0)
x = torch.randn(100, 32, 8)  # [T, B, I]
profiles = {}
for name in ("RNN", "GRU", "LSTM"):
    rnn = getattr(fastrnn, name)(8, 64)
    if name == "LSTM":
        with torch.no_grad():
            rnn.bias_hh_l0[64:128] = 2.0  # forget gates start open (Gers et al. 2000)
    with StateGradientNorms(rnn) as norms:
        rnn(x)[0][-1].square().mean().backward()
        profiles[name] = norms.take()["h layer 1"].numpy()
    print(f"{name}: {describe(profiles[name])}")
plots.profile(profiles, "dL/dh, loss at the last step").savefig("gradient_flow.png", dpi=110)
