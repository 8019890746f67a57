"""``python -m fastrnn doctor``: what this installation is made of, whether it works, and what to do if not.

It works where the rest of fastrnn does not: the compiled part is loaded inside a check, and the self-test
runs in a separate process, so that a crash there is a finding and does not end the doctor.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from fastrnn._load import Load

OK, NOTE, WARNING, BROKEN, SKIPPED = "ok", "note", "warning", "broken", "skipped"
COLOURS = {OK: "32", NOTE: "36", WARNING: "33", BROKEN: "31", SKIPPED: "2"}
PACKAGE = Path(__file__).parent
OLDEST_TORCH = (2, 10)
EXTRAS = {
    "train": ("jsonargparse", "lightning", "matplotlib", "numpy", "rich", "tensorboard", "torchmetrics"),
    "bench": ("matplotlib", "rich"),
}
LOOK = 0.5  # seconds for which the load of the machine is counted
# Largest error, relative to the largest value, of fastrnn beside torch.nn in float64.
BOUNDS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.5}


@dataclass(frozen=True)
class Check:
    name: str
    status: str
    found: str
    advice: str = ""


# ---- What is installed -------------------------------------------------------------------------------


def check_python() -> Check:
    return Check("python", OK, f"{platform.python_version()} on {platform.platform()}")


def check_torch() -> Check:
    upgrade = "pip install --upgrade 'torch>=2.10'"
    try:
        import torch
    except ImportError as error:
        return Check("torch", BROKEN, f"cannot be imported: {error}", upgrade)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return Check("torch", BROKEN, f"{torch.__version__} is older than 2.10", upgrade)
    return Check(
        "torch", OK, f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )


def check_build() -> Check:
    """The compiled part is there, loads, and is no older than the sources beside it."""
    rebuild = "in a checkout: make build; elsewhere: pip install --force-reinstall --no-deps fastrnn"
    libraries = list(PACKAGE.glob("_C.*so"))
    if not libraries:
        return Check("build", BROKEN, f"there is no compiled part in {PACKAGE}", rebuild)
    try:
        import torch  # noqa: F401  (its libraries have to be in the process first)

        import_module("fastrnn._C")
    except ImportError as error:
        if "undefined symbol" in str(error):
            rebuild = f"this torch lacks what the build needs: torch>=2.10; or {rebuild}"
        return Check("build", BROKEN, f"the compiled part does not load: {error}", rebuild)
    built = libraries[0].stat().st_mtime
    csrc = PACKAGE.parent / "csrc"
    sources = [path for path in csrc.rglob("*.*") if csrc / "testing" not in path.parents]
    newer = sum(source.stat().st_mtime > built for source in sources)
    if newer:
        return Check("build", WARNING, f"{newer} files in csrc are newer than {libraries[0]}", "make build")
    return Check("build", OK, str(libraries[0]))


def has_cuda_kernels() -> bool:
    return any(PACKAGE.glob("_C_cuda*.so"))


def check_cuda() -> Check:
    import torch

    from fastrnn import _cuda

    reason = _cuda.missing() if has_cuda_kernels() else "this build has no CUDA kernels"
    if not torch.cuda.is_available():
        found = reason or f"the kernels are here, for CUDA {torch.version.cuda}"
        return Check("cuda", NOTE, f"{found}; torch sees no GPU, so that nothing is lost")
    devices = range(torch.cuda.device_count())
    reasons = [reason or _cuda.device_reason(i) for i in devices]
    names = ", ".join(torch.cuda.get_device_name(i) for i in devices)
    if not any(reasons):
        return Check("cuda", OK, f"kernels for {names}, CUDA {torch.version.cuda}")
    return Check(
        "cuda",
        WARNING,
        f"{'; '.join(sorted({r for r in reasons if r}))}, and torch sees {names}",
        "there, modules take torch.nn's own path and warn once, which fastrnn.set_strict(True) forbids; a "
        "build with FASTRNN_CUDA=1 has the kernels",
    )


def check_extras() -> Check:
    missing = {extra: [name for name in modules if not find_spec(name)] for extra, modules in EXTRAS.items()}
    lacking = [extra for extra, modules in missing.items() if modules]
    if not lacking:
        return Check("extras", OK, ", ".join(EXTRAS))
    found = "; ".join(f"{extra} lacks {', '.join(missing[extra])}" for extra in lacking)
    return Check("extras", NOTE, found, f"if you want them: pip install 'fastrnn[{','.join(lacking)}]'")


# ---- The machine -------------------------------------------------------------------------------------


def available_cores() -> float:
    """Cores that this process may use: by its affinity, or by its control group's quota if that is less."""
    cores: float = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, int(limit) / int(period))
    return cores


def check_threads() -> Check:
    import torch

    threads, cores = torch.get_num_threads(), available_cores()
    found = f"torch uses {threads}; this process may use {cores:g} of {os.cpu_count()} cores"
    if threads > max(cores, 1):
        advice = (
            f"threads wait for each other: torch.set_num_threads({max(int(cores), 1)}) or OMP_NUM_THREADS"
        )
        return Check("threads", WARNING, found, advice)
    return Check("threads", OK, found)


def check_load() -> Check:
    import torch

    load = Load()
    time.sleep(LOOK)
    found = load.against(torch.get_num_threads())
    if not found:
        return Check("load", OK, "the cores are free")
    advice = "fewer threads: OMP_NUM_THREADS"
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        advice = f"OMP_WAIT_POLICY=passive, so that torch's threads sleep while they wait; or {advice}"
    return Check("load", WARNING, f"{found}: expect less speed", advice)


def check_instruction_set(isa: str, products: str = "") -> Check:
    wanted = os.environ.get("FASTRNN_CPU_ISA")
    if wanted:
        return Check("kernels", NOTE, f"{isa}, as FASTRNN_CPU_ISA says", "unset it for the best ones")
    if isa == "baseline" and platform.machine() == "x86_64":
        found = "baseline, because this processor has no AVX2"
        return Check("kernels", WARNING, found, "expect several times less speed")
    return Check("kernels", OK, isa + products)


# ---- The self-test: every module, forward and backward, beside torch.nn in float64 --------------------


def _results(module, x) -> list:
    """Outputs and every gradient of a module, for a loss that depends on all outputs."""
    import torch

    def flatten(value):
        return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flatten(part)]

    outputs = flatten(module(x))
    loss = sum(
        (y * torch.arange(y.numel(), dtype=torch.float64).cos().to(y).view_as(y)).sum() for y in outputs
    )
    leaves = [x, *module.parameters()]
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def self_test() -> dict:
    """The name of the kernels, and per module and dtype the largest relative error."""
    import torch

    import fastrnn

    fastrnn.set_strict(True)  # a test of torch.nn beside torch.nn would always pass
    stack = {"num_layers": 2, "bidirectional": True}
    cases: dict[str, tuple[str, dict]] = {
        "LSTM": ("LSTM", stack),
        "LSTM with projection": ("LSTM", {**stack, "proj_size": 5}),
        "GRU": ("GRU", stack),
        "RNN tanh": ("RNN", stack),
        "RNN relu": ("RNN", {**stack, "nonlinearity": "relu"}),
        "LSTMCell": ("LSTMCell", {}),
        "GRUCell": ("GRUCell", {}),
        "RNNCell": ("RNNCell", {}),
    }
    torch.manual_seed(0)
    errors = {}
    for label, (name, options) in cases.items():
        theirs = getattr(torch.nn, name)(17, 37, dtype=torch.float64, **options)
        ours = getattr(fastrnn, name)(17, 37, dtype=torch.float64, **options)
        ours.load_state_dict(theirs.state_dict())
        shape = (9, 17) if name.endswith("Cell") else (12, 9, 17)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = _results(theirs, x)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            found = _results(ours.to(dtype), x.detach().to(dtype).requires_grad_())
            each = [
                (f.double() - e).abs().max() / e.abs().max().clamp(min=1)
                for f, e in zip(found, expected, strict=True)
            ]
            worst = float(torch.stack(each).max())  # NaN, if there is one
            errors[f"{label}, {str(dtype).removeprefix('torch.')}"] = worst
    products = {"bfloat16": torch.ops.fastrnn.cpu_bfloat16(), "int8": torch.ops.fastrnn.cpu_int8()}
    said = "".join(f", {numbers} by {name}" for numbers, name in products.items() if name)
    return {"isa": torch.ops.fastrnn.cpu_isa(), "products": said, "errors": errors}


def check_native() -> list[Check]:
    """Runs the self-test in a separate process and reports a crash as a finding."""
    command = "import json; from fastrnn import doctor; print(json.dumps(doctor.self_test()))"
    child = subprocess.run(
        [sys.executable, "-c", command], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    if child.returncode:
        return [Check("self-test", BROKEN, *_death(child.returncode, child.stderr))]
    report = json.loads(child.stdout.splitlines()[-1])
    errors = report["errors"]
    wrong = [
        f"{label}: error {error:.1e}"
        for label, error in errors.items()
        if not error <= BOUNDS[label.split(", ")[1]]
    ]
    kernels = check_instruction_set(report["isa"], report["products"])
    if wrong:
        advice = "report it with this page; FASTRNN_CPU_ISA=baseline may work meanwhile"
        return [kernels, Check("self-test", BROKEN, "; ".join(wrong), advice)]
    found = f"{len(errors)} comparisons with torch.nn, forward and backward; "
    worst = {dtype: max(e for label, e in errors.items() if label.endswith(dtype)) for dtype in BOUNDS}
    found += "largest error " + ", ".join(f"{error:.0e} in {dtype}" for dtype, error in worst.items())
    return [kernels, Check("self-test", OK, found)]


def _death(returncode: int, stderr: str) -> tuple[str, str]:
    """(finding, advice) for a self-test that raised or crashed."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if "FASTRNN_CPU_ISA" in last:
        advice = "unset FASTRNN_CPU_ISA, or name one that this processor has: avx512, avx2, baseline"
        return f"it failed: {last}", advice
    if returncode > 0:
        return f"it failed: {last}", "report it with this page"
    name = signal.Signals(-returncode).name
    advice = "report it with this page; FASTRNN_CPU_ISA=baseline may work meanwhile"
    return f"it died of {name}: {last}".rstrip(": "), advice


# ---- The command -------------------------------------------------------------------------------------


def guarded(check: Callable[[], Check]) -> Check:
    """The check's result; an unexpected exception is reported as a finding too."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        return Check(name, BROKEN, f"{type(error).__name__}: {error}", "report it with this page")


def run_checks() -> list[Check]:
    checks = [guarded(check_python), guarded(check_torch)]
    if checks[-1].status == BROKEN:
        return [*checks, *(Check(name, SKIPPED, "needs torch") for name in ("build", "self-test"))]
    checks += [guarded(check) for check in (check_build, check_cuda, check_threads, check_load, check_extras)]
    if checks[2].status == BROKEN:
        return [*checks, Check("self-test", SKIPPED, "needs the compiled part")]
    native = check_native()
    if checks[2].status == WARNING:  # the first thing to try
        native = [replace(c, advice=checks[2].advice) if c.status == BROKEN else c for c in native]
    return [*checks, *native]


def show(checks: list[Check]) -> None:
    for check in checks:
        mark = f"{check.status:8}"
        if sys.stdout.isatty():
            mark = f"\033[{COLOURS[check.status]}m{mark}\033[0m"
        print(f"{mark} {check.name:10} {check.found}")
        if check.advice:
            print(f"{'':19} -> {check.advice}")


def main(argv: list[str]) -> int:
    """0 if everything that fastrnn needs works, 1 if something is broken."""
    description = "Check the installation; the exit status is 1 if something is broken."
    parser = argparse.ArgumentParser("python -m fastrnn doctor", description=description)
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options = parser.parse_args(argv)
    checks = run_checks()
    broken = [check.name for check in checks if check.status == BROKEN]
    if options.json:
        print(json.dumps({"works": not broken, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        show(checks)
        print(f"\nBroken: {', '.join(broken)}." if broken else "\nfastrnn works.")
    return 1 if broken else 0
