"""The classic first recurrent model, written for torch.nn; only the import of LSTM is another."""

import torch
from torch import nn

from fastrnn import LSTM


class SimpleLSTM(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.lstm = LSTM(input_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, I] -> [B, O]
        out, _ = self.lstm(x)
        return self.fc(out[:, -1, :])


torch.manual_seed(0)
x, y = torch.randn(100, 5, 10), torch.randn(100, 1)
model = SimpleLSTM(input_size=10, hidden_size=20, output_size=1)
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

for epoch in range(5):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    print(f"Epoch [{epoch + 1}/5], Loss: {loss.item():.4f}")
