"""Every instruction set and every number of threads gives torch.nn's results, and nobody ever waits for ever.

Each check is a process of its own, because the instruction set is chosen once and thread pools are for life.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ISAS = ("avx512", "avx2", "baseline")


def start(script, *arguments, isa=None, prefix=(), **environment):
    search = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    if os.environ.get("PYTHONPATH"):
        search.reverse()  # the package that this process tests comes first
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))} | environment
    if isa:
        env["FASTRNN_CPU_ISA"] = isa
    return subprocess.Popen(
        [*prefix, sys.executable, *(["-c", script] if "import " in script else [script]), *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, seconds=240):
    """Its output; a process that does not end in time is a deadlock."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"did not finish within {seconds} s; output so far:\n{output}")
    return output


def check(*arguments, script=str(TESTS / "sweep.py"), **options):
    process = start(script, *arguments, **options)
    output = finish(process)
    assert process.returncode == 0, output
    return output


@pytest.fixture(params=ISAS)
def isa(request):
    process = start("import fastrnn, torch; print(torch.ops.fastrnn.cpu_isa())", isa=request.param)
    output = finish(process)
    if process.returncode != 0:
        assert "not available on this processor" in output
        pytest.skip(f"this processor has no {request.param}")
    assert output.split()[-1] == request.param
    return request.param


def test_an_unknown_instruction_set_is_refused_loudly():
    process = start("import fastrnn, torch; torch.ops.fastrnn.cpu_isa()", isa="mmx")
    output = finish(process)
    assert process.returncode != 0
    assert "FASTRNN_CPU_ISA=mmx is unknown" in output


def test_without_an_override_the_best_instruction_set_is_chosen():
    env = {k: v for k, v in os.environ.items() if k != "FASTRNN_CPU_ISA"}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not flags or "FASTRNN_CPU_ISA" in os.environ:
        pytest.skip("cannot know what this processor has")
    expected = "avx512" if "avx512vl" in flags else "avx2" if "avx2" in flags else "baseline"
    assert env is not None
    output = check(script="import fastrnn, torch; print(torch.ops.fastrnn.cpu_isa())")
    assert output.split()[-1] == expected


def test_every_instruction_set_equals_torch_nn(isa):
    assert isa in check("--configs", "60", "--seed", "5000", isa=isa)


@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_every_number_of_threads_equals_torch_nn(threads):
    assert f"{threads} threads" in check("--configs", "40", "--seed", "7000", "--threads", threads)


def test_more_threads_than_cores_finish():
    check("--configs", "25", "--seed", "8000", OMP_NUM_THREADS="8")


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_several_threads_on_one_core_finish():
    check("--configs", "25", "--seed", "8100", "--threads", "4", prefix=("taskset", "-c", "0"))


def test_busy_neighbours_do_not_stop_it():
    busy = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    neighbours = [start(busy) for _ in range(3)]
    try:
        check("--configs", "15", "--seed", "8200", "--threads", "2")
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()


BITS = """
import hashlib, torch, fastrnn
torch.set_num_threads(2)
torch.manual_seed(0)
m = fastrnn.LSTM(40, 256, 2)
x = torch.randn(300, 1, 40, requires_grad=True)
assert torch.ops.fastrnn.cpu_plan(300, 1, 256, 296, 4, 1, 4, 4) == [1, 2]  # units are shared
digest = hashlib.sha256()
for _ in range(20):
    y = m(x)[0]
    for found in (y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])):
        digest.update(found.detach().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_the_bits_do_not_depend_on_how_many_members_a_team_has_left():
    # On one core each team loses members, in a call and from the next one on.
    assert check(script=BITS) == check(script=BITS, prefix=("taskset", "-c", "0"))


CONCURRENT = """
import threading, torch, fastrnn
torch.set_num_threads(4)
m = fastrnn.LSTM(8, 200, bidirectional=True)
x = torch.randn(30, 2, 8)
y = m(x)[0].detach()
wrong = []
def work():
    for _ in range(10):
        got = m(x)[0]
        torch.autograd.grad(got.sum(), m.weight_hh_l0)
        if not torch.allclose(got, y, atol=1e-5): wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong
"""


def test_many_callers_that_share_units_among_threads_finish():
    check(script=CONCURRENT)


NESTED = """
import torch, fastrnn
torch.set_num_threads(2)
m = fastrnn.GRU(8, 200)
x = torch.randn(30, 1, 8, requires_grad=True)
y = m(x)[0].detach()
# Two tasks of torch's interpreter pool at once, and the reverse pass in the autograd engine's own thread.
def forward(x):
    return m(x)[0]
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(forward, [x] * 8))
for got in results:
    assert torch.allclose(got, y, atol=1e-5)
    got.sum().backward()
# Inside torch's own parallel regions: a data loader's workers and vmap call from wherever they like.
fork = torch.jit.fork
pending = [fork(forward, x.detach()) for _ in range(4)]
for p in pending:
    assert torch.allclose(torch.jit.wait(p), y, atol=1e-5)
"""


def test_calls_from_inside_other_parallel_work_finish():
    check(script=NESTED)


REGION = """
import ctypes, torch, fastrnn
torch.set_num_threads(4)
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
if not libraries:
    print("no libgomp"); raise SystemExit(0)
omp = ctypes.CDLL(libraries.pop())
m = fastrnn.LSTM(8, 200)
x = torch.randn(30, 2, 8)
y = m(x)[0].detach()
results = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    assert omp.omp_in_parallel()
    got = m(x)[0]
    torch.autograd.grad(got.sum(), m.weight_hh_l0)
    results.append(got.detach())
omp.GOMP_parallel(body, None, 4, 0)
assert len(results) == 4, results
assert all(torch.allclose(got, y, atol=1e-5) for got in results)
"""


def test_calls_from_all_threads_of_a_parallel_region_finish():
    check(script=REGION)
