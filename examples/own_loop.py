"""A character model in a loop of one's own: chunks, carried state and clipping from the package."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from fastrnn import LSTM
from fastrnn.training import StateCarrier, StreamChunks, TextData, clip

torch.manual_seed(0)
text = TextData(limit=200_000)
chunks = StreamChunks(text.parts["train"], rows=16, k1=32, k2=48)  # update every 32, go back 48
symbols = len(text.spec["vocabulary"])

embed, rnn, head = nn.Embedding(symbols, 32), LSTM(32, 64), nn.Linear(64, symbols)
parameters = [p for module in (embed, rnn, head) for p in module.parameters()]
optimizer, carrier = torch.optim.Adam(parameters, lr=5e-3), StateCarrier()

for step, batch in enumerate(chunks):
    h = carrier(rnn, embed(batch.x), batch.reset, batch.keep)  # [T, B, H]
    loss = F.cross_entropy(head(h).flatten(0, 1), batch.y.flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = clip(parameters, norm=1.0, value=None)
    optimizer.step()
    if step % 40 == 0:
        print(f"step {step:3} {loss / math.log(2):.2f} bits per character, gradient norm {norm:.2f}")
    if step == 120:
        break
