"""The load of the machine: what others use of its cores, and how the command lines meet it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn import _load, doctor
from fastrnn.bench.neighbours import busy_neighbours

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A /proc/stat of two cores, a clock and the CPU time of this process, all as the test sets them."""

    def __init__(self, path, monkeypatch):
        self.path, self.now, self.own = path, 100.0, 0.0
        self.used, self.stolen = [1000.0, 1000.0, 9000.0], [0.0, 0.0, 50.0]
        self.write()
        monkeypatch.setattr(_load, "STAT", path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(os, "times", lambda: (self.own, 0.0, 0.0, 0.0, 0.0))
        monkeypatch.setattr(_load.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(doctor.time, "sleep", self.sleep)
        self.next = (0.0, 0.0, 0.0)

    def sleep(self, seconds):
        self.pass_(seconds, *self.next)

    def write(self):
        rows = ["cpu 1 2 3 4 5 6 7 8 9 10"]
        for core, (used, stolen) in enumerate(zip(self.used, self.stolen, strict=True)):
            user, steal = round(used * TICKS), round(stolen * TICKS)
            rows.append(f"cpu{core} {user - 40} 10 10 77777 88888 10 10 {steal} 0 0")
        self.path.write_text("\n".join([*rows, "intr 5 6 7", ""]))

    def pass_(self, seconds, others, own, host):
        """Time passes, in which so many cores work for others, for this process, and for the host."""
        self.now += seconds
        self.own += own * seconds
        for core in (0, 1):
            self.used[core] += (others + own) / 2 * seconds
            self.stolen[core] += host / 2 * seconds
        self.used[2] += 5 * seconds  # a core that this process may not use
        self.write()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path / "stat", monkeypatch)


def test_what_others_use_is_neither_ours_nor_on_other_cores(machine):
    load = _load.Load()
    machine.pass_(10, others=0.5, own=1.0, host=0.2)
    assert load.others() == pytest.approx((0.5, 0.2), abs=0.01)


@pytest.mark.parametrize(
    ("others", "host", "threads", "said"),
    [
        (0.0, 0.0, 2, ""),
        (0.3, 0.1, 2, ""),
        (1.0, 0.0, 1, ""),
        (1.0, 0.0, 2, "other processes use 1.0 of 2 cores"),
        (0.0, 0.9, 2, "other processes use 0.0 of 2 cores, the host of this virtual machine 0.9"),
    ],
)
def test_a_machine_is_busy_where_others_use_the_cores_that_threads_want(machine, others, host, threads, said):
    load = _load.Load()
    machine.pass_(2, others, 0.0, host)
    assert load.against(threads) == said


def test_without_proc_stat_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "STAT", tmp_path / "absent")
    assert _load.Load().others() == (0.0, 0.0)


def test_the_doctor_sees_a_loaded_machine_and_says_what_helps(machine, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert doctor.check_load().status == "ok"
    machine.next = (1.5, 0.0, 0.0)
    check = doctor.check_load()
    assert check.status == "warning"
    assert "1.5 of 2 cores" in check.found
    assert "OMP_WAIT_POLICY=passive" in check.advice
    assert "OMP_NUM_THREADS" in check.advice
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" not in doctor.check_load().advice


def test_threads_sleep_on_a_busy_machine_and_spin_on_a_quiet_one(machine, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    _load.let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ
    machine.next = (1.5, 0.0, 0.0)
    _load.let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


SAY = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'), flush=True)"


@pytest.mark.parametrize(
    ("command", "given", "policy"),
    [
        ("train", {}, "passive"),
        ("train", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("train", {"GOMP_SPINCOUNT": "500"}, None),
        ("bench", {}, None),
        ("doctor", {}, None),
    ],
)
def test_beside_busy_processes_only_training_lets_threads_sleep_unless_the_user_has_chosen(
    tmp_path, command, given, policy
):
    # A torch that says what it finds when it is loaded, and ends the process.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"{SAY}\nos._exit(7)")
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    with busy_neighbours(len(os.sched_getaffinity(0)) + 1):
        found = subprocess.run(
            [sys.executable, "-m", "fastrnn", command, "--help"],
            env=kept | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} | given,
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert found.returncode == 7, found.stderr
    assert found.stdout.split() == [str(policy), given.get("GOMP_SPINCOUNT", "None")]
