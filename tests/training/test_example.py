"""Programs written for torch.nn run unchanged but for the import."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn

EXAMPLES = Path(__file__).parents[2] / "examples"


class SimpleLSTM(nn.Module):
    """The classic first recurrent model: an LSTM and a linear layer on its last step."""

    def __init__(self, library, input_size: int, hidden_size: int, output_size: int) -> None:  # type: ignore
        super().__init__()
        self.lstm = library.LSTM(input_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(x)
        return self.fc(out[:, -1, :])


def five_epochs(library) -> list[float]:  # type: ignore
    torch.manual_seed(0)
    model = SimpleLSTM(library, 10, 20, 1)
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(100, 5, 10), torch.randn(100, 1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_simple_lstm_learns_the_same_from_either_library() -> None:
    ours, theirs = five_epochs(fastrnn), five_epochs(nn)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_examples_run(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
