"""Tests of the suite that need a GPU, and their outcomes.

python -m benchmarks.gpu_tests            some minutes, mostly of compilers, in eight processes
python -m benchmarks.gpu_tests --smoke    one of them, in Triton's interpreter
"""

import argparse
from collections.abc import Sequence

import pytest

from modeling_adala.errors import AdaLAError

from .common import ROOT, Row, device, parser, run_script, write_result

KERNELS = "tests/modeling_adala/kernels"
SUITE = f"{KERNELS}/triton_suite.py"
FILES = (SUITE, f"{KERNELS}/test_triton_backend.py", f"{KERNELS}/test_backends.py", "tests/test_whole_model_speed.py")
# they run the suite again, in its own process, and compile for other cards
LEFT_OUT = f"{KERNELS}/test_triton_backend.py::test_kernels"
PARALLEL = ("-n", "8", "--dist", "load", "--deselect", LEFT_OUT)
ONE_TEST = ("-n", "0", "-k", "test_no_tokens_and_no_images")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--tests", nargs="+", default=FILES, metavar="FILE", help="what to run instead")
    args = options.parse_args(argv)
    files, chosen = ([SUITE], ONE_TEST) if args.smoke else (args.tests, PARALLEL)
    outcomes = Outcomes(args)
    plain = ("-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    pytest.main([*plain, *chosen, *(str(ROOT / file) for file in files)], plugins=[outcomes])
    failed = [row["name"] for row in outcomes.rows if row["outcome"] == "failed"]
    if failed or not any(row["outcome"] == "passed" for row in outcomes.rows):
        raise AdaLAError(f"{len(failed)} of {len(outcomes.rows)} tests failed: {', '.join(failed) or 'none ran'}")


class Outcomes:
    """Plugin of pytest that writes the outcome of each test at once, so that a kill loses none."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, list[Row]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        message = "" if report.outcome == "passed" else str(report.longreprtext).strip().rpartition("\n")[2]
        row = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "message": message}
        self.rows.append(row)
        facts = {"subject": "Tests of the suite that need a GPU"}
        write_result("tests", self.rows, smoke=self.args.smoke, output=self.args.output, device=device(), **facts)


if __name__ == "__main__":
    run_script(main)
