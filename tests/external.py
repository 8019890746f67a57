"""Other projects' test suites on fastrnn: ``python tests/external.py SUITE CHECKOUT [PYTEST ARGUMENTS]``.

Runs the part of a suite that meets recurrent modules twice, as it is and with torch.nn's LSTM, GRU, RNN and
cells replaced by fastrnn's, and names the tests whose outcome differs; ends with 1 if a test that passed does
not any more. CHECKOUT is a folder with the project's sources; what it depends on must be installed. Of a
project that is compiled, such as TorchRL, install it and give a folder with its ``test`` alone.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

SUITES = {
    "icefall": [
        "egs/librispeech/ASR/transducer/test_rnn.py",
        "egs/librispeech/ASR/lstm_transducer_stateless2/test_lstmp.py",
    ],
    "keras": ["keras/src/layers/rnn"],  # on torch; its layers have loops of their own
    "opacus": [
        "opacus/tests/grad_samples/dp_rnn_test.py", "opacus/tests/dp_layers/dp_rnn_test.py",
        "opacus/tests/validators/lstm_test.py", "opacus/tests/validators/gru_test.py",
    ],
    "pytorch-forecasting": ["tests/test_models/test_nn/test_rnn.py", "tests/test_models/test_deepar.py"],
    "rsl_rl": ["tests/models/test_rnn_model.py", "tests/runners/test_on_policy_runner.py"],
    "sb3-contrib": ["tests/test_lstm.py", "-k", "not performance"],
    "speechbrain": ["tests/unittests/test_RNN.py"],
    "torchrl": ["test/modules/test_rnn.py"],
}  # fmt: skip
ENVIRONMENT = {"KERAS_BACKEND": "torch", "OMP_WAIT_POLICY": "passive"}
SWAP = "FASTRNN_EXTERNAL_SWAP"
ROOT = Path(__file__).resolve().parent.parent

if os.environ.get(SWAP):  # in the suite's own process: pytest imports this file first, by -p external
    from torch import nn

    import fastrnn

    for name in fastrnn.modules.__all__:
        setattr(nn, name, getattr(fastrnn, name))


def outcomes(checkout: Path, arguments: list[str], swapped: bool) -> dict[str, str]:
    """{test: passed, failed, error or skipped}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "external", "-p", "no:cacheprovider",
            f"--junitxml={report}", *arguments,
        ]  # fmt: skip
        folders = [(checkout / a).parent for a in arguments if (checkout / a).is_file()]  # icefall's siblings
        paths = [checkout, ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", ""), *folders]
        variables = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        if swapped:
            variables[SWAP] = "1"
        done = subprocess.run(
            command, cwd=checkout, env=variables, capture_output=True, text=True, check=False
        )
        if not report.exists() or done.returncode > 1:
            sys.exit(
                f"external: pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
            )
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
        return found


def main(suite: str, checkout: str, *arguments: str) -> int:
    asked = [*SUITES[suite], *arguments]
    before, after = (outcomes(Path(checkout).resolve(), asked, swapped) for swapped in (False, True))
    for name, found in (("torch.nn", before), ("fastrnn", after)):
        print(
            f"{name:9}",
            ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(found.values()).items())),
        )
    differ = [test for test in before if after.get(test) != before[test]]
    for test in differ:
        print(f"{before[test]} -> {after.get(test, 'not run')}: {test}")
    return int(any(before[test] == "passed" for test in differ) or "passed" not in before.values())


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in SUITES:
        sys.exit(f"usage: external.py {{{','.join(SUITES)}}} CHECKOUT [PYTEST ARGUMENTS]")
    sys.exit(main(*sys.argv[1:]))
