"""A training run that begins on a busy machine says so, once, and a quiet one says nothing."""

import logging

import pytest
from conftest import language_model, trainer

from fastrnn.training.speed import Throughput


@pytest.mark.parametrize(("others", "said"), [(1.5, 1), (0.0, 0)])
def test_a_run_on_a_busy_machine_says_that_it_is_slower(tmp_path, text, monkeypatch, caplog, others, said):
    monkeypatch.setattr("fastrnn._load.Load.others", lambda load: (others, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, Throughput(), max_steps=2).fit(language_model(text), text)
    lines = [message for message in caplog.messages if "this machine is busy" in message]
    assert len(lines) == said
    assert all("other processes use 1.5 of 1 cores" in line and "slower" in line for line in lines)
