"""The benchmark tells the truth: its cases, its pairing, its files and its verdicts."""

import importlib
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import fastrnn
from fastrnn import bench
from fastrnn.bench import cases, compare, measure, run, runner, workload
from fastrnn.bench.cases import CASES, INFER, TRAIN, Case
from fastrnn.bench.measure import Quartiles, paired
from fastrnn.bench.peak import Peak, measure_peak
from fastrnn.bench.results import Record, Results, describe_environment

CELLS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
SMALL = [
    Case("LSTM", 4, 3, 5, 6),
    Case("GRU", 4, 3, 5, 6, group="stack", layers=2, bidirectional=True, dropout=0.5),
    Case("LSTM", 4, 3, 5, 6, group="packed", fill=0.7),
    Case("LSTM", 4, 3, 5, 6, group="proj", proj_size=2),
    Case("RNN", 1, 1, 5, 6, group="fp64", dtype=torch.float64),
    Case("LSTMCell", 4, 3, 5, 6, group="loop"),
    Case("MinGRU", 4, 3, 5, 6, group="linear"),
    Case("LSTM", 4, 3, 6, 6, group="options", options=(("zoneout", 0.1), ("reset", 0.3), ("reset_to", True))),
]


@pytest.fixture(autouse=True)
def thread_count_is_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_as_fastrnn(monkeypatch):
    """torch.nn's modules on both sides: the benchmark is tested here, not the kernels."""
    for name in CELLS:
        monkeypatch.setattr(fastrnn, name, getattr(nn, name), raising=False)


def record(low, median, high, case="lstm-1x1x1", **changes):
    ratios = {"torch": Quartiles(low, median, high)}
    times = {"torch": median, "fastrnn": 1.0}
    whole = Record(case, "LSTM training", TRAIN, 2, times, ratios, 10.0, 0.1, 5, 1, False)
    return replace(whole, **changes)


def results(*records):
    return Results(describe_environment({2: Peak(100.0, "test")}), list(records))


def test_names_are_unique_and_every_targeted_class_has_a_case():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(cases.TARGETS) <= {case.class_of(mode) for case in CASES for mode in case.modes}


def test_smoke_cases_cover_every_class():
    quick = cases.smallest_of_each_class(CASES)
    assert {case.group for case in quick} == {case.group for case in CASES}
    assert len(quick) < len(CASES) / 2


def test_short_calls_are_one_step_of_a_stack_and_sixteen_of_a_cell():
    short = [
        (c.cell, c.T, c.B, c.I, c.H, c.layers) for c in CASES if c.class_of(TRAIN) == "short calls training"
    ]
    sizes = [(B, H, H) for B in (1, 8) for H in (4, 128, 320)]
    stacks = [(cell, 1, *size, layers) for cell in ("LSTM", "GRU") for size in sizes for layers in (1, 2)]
    loops = [(cell, 16, *size, 1) for cell in ("LSTMCell", "GRUCell") for size in sizes]
    assert sorted(short) == sorted(stacks + loops)


@pytest.mark.parametrize(("group", "measured"), [("dense", True), ("short", False)])
def test_memory_is_measured_where_it_is_above_the_noise(monkeypatch, torch_as_fastrnn, group, measured):
    monkeypatch.setattr(runner, "peak_megabytes", lambda *a: 2.0)
    case = Case("GRU", 3, 2, 4, 4, group=group)
    found = runner.measure_case(case, TRAIN, 1, Peak(100.0, "test"), 0, memory=True)
    assert bool(found.megabytes) == measured


def test_lengths_descend_from_T_to_the_fill():
    case = Case("LSTM", 200, 32, 128, 128, fill=0.56)
    lengths = case.lengths()
    assert lengths[0] == 200
    assert bool((lengths[1:] <= lengths[:-1]).all())
    assert float(lengths.float().mean()) / 200 == pytest.approx(0.56, abs=0.01)


def test_operations_are_counted_by_hand():
    assert Case("GRU", 5, 2, 3, 4).flops(INFER) == 2 * 5 * 2 * 3 * 4 * (3 + 4)
    stack = Case("LSTM", 5, 2, 3, 4, layers=2, bidirectional=True, proj_size=2)
    first, second = (2 * (16 * (width + 2) + 2 * 4) for width in (3, 4))
    assert stack.flops(TRAIN) == 3 * 2 * 5 * 2 * (first + second)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [TRAIN, INFER])
def test_a_workload_of_every_kind_agrees_with_its_float64_reference(case, mode):
    work = workload.Workload(case, fastrnn if case.options else nn, mode)
    workload.check(work, workload.reference_results(case, mode))
    states = 2 if case.cell.startswith("LSTM") else 1
    gradients = len(work.leaves) if mode == TRAIN else 0
    assert len(work()) == 1 + states + gradients
    assert work.module.training == (mode == TRAIN)


def test_options_are_timed_beside_the_plain_module(monkeypatch):
    timed = []
    monkeypatch.setattr(runner, "paired", lambda calls, *_: timed.append(calls) or paired(calls, *_))
    found = runner.measure_case(SMALL[-1], TRAIN, 1, Peak(100.0, "test"), 0.01, memory=True)
    modules = {name: call.module for name, call in timed[0].items()}
    assert all(type(module) is fastrnn.LSTM for module in modules.values())
    assert ["zoneout" in repr(module) for module in modules.values()] == [False, True]
    assert list(timed[0]["fastrnn"].keywords) == ["reset", "reset_to"]
    assert timed[0]["torch"].keywords == {}
    assert (found.group, found.megabytes) == ("options beside plain training", {})


def test_a_wrong_result_fails_before_it_is_timed(monkeypatch, torch_as_fastrnn):
    class Wrong(nn.GRU):
        def forward(self, x, hx):
            y, h = super().forward(x, hx)
            return y * 1.001, h

    monkeypatch.setattr(fastrnn, "GRU", Wrong)
    with pytest.raises(workload.Disagreement, match=r"gru-3x2x4: result 0 is off by 1\.0e-03"):
        runner.measure_case(Case("GRU", 3, 2, 4, 4), INFER, 1, Peak(100.0, "test"), 0.01)


def test_the_ratio_of_a_known_pair_is_found():
    pair = {"torch": lambda: time.sleep(0.015), "fastrnn": lambda: time.sleep(0.005)}
    timing = paired(pair, "fastrnn", 0.1, others_cpu=lambda: 0.0)
    assert timing.ratios["torch"].median == pytest.approx(3, rel=0.15)
    assert timing.seconds["fastrnn"] == pytest.approx(0.005, rel=0.2)
    assert timing.rounds >= measure.MIN_ROUNDS
    assert not timing.disturbed


def test_contenders_alternate_their_order(monkeypatch):
    monkeypatch.setattr(measure, "MIN_TURN", 1e-9)
    turns = []
    pair = {name: lambda name=name: turns.append(name) for name in "ab"}
    paired(pair, "a", 0, others_cpu=lambda: 0.0)
    firsts = turns[-2 * measure.MIN_ROUNDS :: 2]
    assert firsts == ["a", "b", "a", "b", "a"]


def test_disturbed_rounds_are_thrown_away():
    readings = iter([0, 1, *[1] * 100])  # another process takes a second during the first round
    timing = paired({"a": int, "b": int}, "a", 0, others_cpu=lambda: next(readings))
    assert (timing.rounds, timing.discarded, timing.disturbed) == (measure.MIN_ROUNDS, 1, False)


def test_on_a_machine_that_is_never_quiet_the_result_says_so():
    clock = iter(range(1000))
    timing = paired({"a": int, "b": int}, "a", 0, others_cpu=lambda: next(clock))
    assert timing.disturbed
    assert timing.rounds == measure.PATIENCE * measure.MIN_ROUNDS


def test_other_processes_cpu_time_is_what_is_busy_but_not_ours(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 50 9999 8888 1 2 3 0 0\ncpu0 50 0 0 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(measure, "STAT", stat)
    monkeypatch.setattr(time, "process_time", lambda: 0.5)
    assert measure.cpu_seconds_of_others() == pytest.approx(1.66 - 0.5)


def test_the_peak_is_above_a_matrix_product():
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    start = time.thread_time()
    torch.mm(a, a)
    assert measure_peak(1).gflops > 0.9 * 2 * 512**3 / (time.thread_time() - start) / 1e9


def test_json_round_trip(tmp_path):
    written = results(record(1.0, 1.5, 2.0, megabytes={"torch": 3.0, "fastrnn": 2.0}))
    written.save(tmp_path / "new" / "a.json")
    assert Results.load(tmp_path / "new" / "a.json") == written


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99, "records": []}'])
def test_foreign_files_are_refused(tmp_path, content, capsys):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert bench.main(["compare", str(path), str(path)]) == 2
    assert "no file of benchmark results" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (record(1.1, 1.2, 1.3), compare.SLOWER),
        (record(1.3, 1.35, 1.45), compare.SAME),  # quartiles touch
        (record(1.7, 1.8, 1.9), compare.FASTER),
        (record(1.1, 1.2, 1.3, disturbed=True), compare.DISTURBED),
    ],
)
def test_only_what_lies_beyond_the_noise_is_a_change(new, verdict):
    assert compare.verdict(record(1.4, 1.5, 1.6), new) == verdict


def test_a_small_change_is_none_however_quiet_the_runs():
    assert compare.verdict(record(1.49, 1.5, 1.51), record(1.44, 1.45, 1.46)) == compare.SAME


def test_compare_ends_non_zero_on_a_regression_only(tmp_path):
    old, noise, slow = (str(tmp_path / f"{name}.json") for name in ("old", "noise", "slow"))
    other = record(2.0, 2.1, 2.2, case="lstm-2x2x2")
    results(record(1.4, 1.5, 1.6), other).save(tmp_path / "old.json")
    results(record(1.35, 1.42, 1.5), other).save(tmp_path / "noise.json")
    results(record(1.0, 1.1, 1.2), other).save(tmp_path / "slow.json")
    assert bench.main(["compare", old, noise]) == 0
    assert bench.main(["compare", old, slow]) == 1
    assert bench.main(["compare", slow, old]) == 0


def test_a_run_writes_table_json_and_plot(tmp_path, monkeypatch, torch_as_fastrnn, capsys):
    monkeypatch.setattr(run, "CASES", tuple(SMALL[:2]))
    monkeypatch.setattr(run, "measure_peak", lambda threads: Peak(100.0, "test"))
    json, plot = tmp_path / "a.json", tmp_path / "a.png"
    argv = ["--seconds", "0", "--threads", "1", "--mode", INFER, "--json", str(json)]
    assert bench.main([*argv, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert "lstm-4x3x5x6" in table
    assert "stacks inference" in table
    assert [entry.case for entry in Results.load(json).records] == [c.name for c in SMALL[:2]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_classes_and_cases_are_chosen_by_name():
    options = SimpleNamespace(
        quick=False, mode=[TRAIN, INFER], cases=["gru-*"], groups=["gru training", "* one step"]
    )
    chosen = run.choose(options)
    assert {case.class_of(mode) for case, mode in chosen} == {"GRU training", "GRU one step"}
    assert bench.main(["--cases", "nothing"]) == 2


def test_curves_over_T_and_B_are_drawn(tmp_path, torch_as_fastrnn):
    plot = tmp_path / "curves.png"
    argv = ["scaling", "--seconds", "0", "--longest", "10", "--mode", INFER, "--threads", "1"]
    assert bench.main([*argv, "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main([]) == 2
    assert "pip install 'fastrnn[bench]'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_holds_at_least_what_it_returns():
    from fastrnn.bench.memory import peak_megabytes

    case = next(case for case in CASES if case.name == "gru-50x1x1024")
    returned = 4 * (case.T * case.B * 2 * case.H + 2 * 3 * case.H * case.H) / 1e6
    assert returned < peak_megabytes(case, "torch.nn", 1) < 5 * returned


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_peer_computes_the_same_with_converted_weights(cell, bidirectional, peer):
    for package in ("onnx", "onnxruntime", peer):
        pytest.importorskip(package)
    make_call = importlib.import_module(runner.PEERS[peer]).make_call
    case = Case(cell, 4, 3, 5, 6, layers=2, bidirectional=bidirectional)
    work = workload.Workload(case, nn, INFER)
    outputs = [torch.from_numpy(array) for array in make_call(work, 1)()]
    workload.agree(case.name, outputs, workload.reference_results(case, INFER))


def test_runs_with_rounded_weights_say_so_and_are_checked_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CASES", SMALL[:1])
    json = tmp_path / "a.json"
    argv = ["--seconds", "0", "--threads", "1", "--prepack", "int8", "--json", str(json)]
    assert bench.main(argv) == 0
    assert Results.load(json).environment["prepacked"] == "int8"
    assert "prepacked as int8" in capsys.readouterr().out
    prepack = fastrnn.prepack

    def wrong(module, weights):
        with torch.no_grad():
            module.weight_hh_l0.neg_()
        return prepack(module, weights)

    monkeypatch.setattr(fastrnn, "prepack", wrong)
    assert bench.main(argv) != 0
    assert "FAILED" in capsys.readouterr().out


def test_prepacked_and_busy_runs_under_a_held_back_library_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CASES", SMALL[:1])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    modules = []
    prepack = fastrnn.prepack
    monkeypatch.setattr(fastrnn, "prepack", lambda module: modules.append(module) or prepack(module))
    json = tmp_path / "a.json"
    argv = ["--seconds", "0", "--threads", "1", "--prepack", "--busy", "1", "--json", str(json)]
    assert bench.main(argv) == 0
    environment = Results.load(json).environment
    assert environment["variables"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment["prepacked"] is True
    assert environment["busy"] == 1
    assert len(modules) == 1  # inference alone
    assert "prepacked, 1 busy neighbours" in " ".join(capsys.readouterr().out.split())
    assert not any(record.disturbed or record.discarded for record in Results.load(json).records)
