"""Check with which versions of Triton and torch, and for which targets, the kernels work: `make compat`.

    python tests/compat.py                                      # all versions of Triton, all targets
    python tests/compat.py --triton 3.4 3.6 --targets sm_90
    python tests/compat.py --execute emulator                   # also run by a module that emulates (emulated.py)
    python tests/compat.py --triton --torch 2.8 2.11            # the tests on other versions of torch

For each version of Triton the kernels are compiled ahead of time (aot.py) in a separate environment: every call for
sm_90, the core calls for the other targets. A compile error, a spill, too much shared memory or an aligned row that
does not move 16 bytes at a time is a fault, and the command fails. For each version of torch, a separate virtual
environment runs the import, contract and compile tests. Results go to docs/compatibility.json, and from there to the
tables of docs/compatibility.md; results that were not requested stay unchanged.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from aot import faults
from helpers import TARGETS

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".compat"
RESULTS, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
TRITON = ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")
USUAL = ("sm_80", "sm_90", "sm_100", "gfx942")  # --targets also takes sm_89 and sm_120
EVERY_CALL = "sm_90"  # other targets compile the core calls
# Tests of what a version of torch may break: imports, the contract of every op, the compiler, the launch path.
TESTS = ("test_contract.py", "test_layers.py", "test_host_path.py", "test_errors.py", "test_distributions.py",
         "test_private_names.py")  # fmt: skip


def triton_environment(version: str) -> Path | None:
    """A folder with that Triton, to be put first on the search path; None if there is no such version."""
    if importlib.metadata.version("triton").startswith(version + "."):
        return ROOT / "tests"  # the installed Triton
    folder = ENVIRONMENTS / f"triton-{version}"
    if not (folder / "triton").is_dir():
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"triton=={version}.*"]
        if subprocess.run([sys.executable, *command]).returncode:
            return None
    return folder


def ask(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout


def compile_with(version: str, targets: list[str]) -> list[dict] | None:
    """One row per target; None if there is no such Triton."""
    folder = triton_environment(version)
    if folder is None:
        print(f"FAULT Triton {version} is not to be had here", flush=True)
        return None
    environment = {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "0"}
    versions = ask("import torch, triton; print(torch.__version__, triton.__version__)", **environment).split()
    assert versions[1].startswith(version + "."), versions
    rows = []
    for target in targets:
        command = [sys.executable, str(ROOT / "tests" / "aot.py"), "--targets", target]
        command += ["--all"] if target == EVERY_CALL else []
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        calls = {(record["module"], record["call"]) for record in records}
        if records and all("ld.lld" in record.get("error", "") for record in records):
            # Triton 3.4 has no linker for AMD, and accepts only ROCm's.
            rows.append({"torch": versions[0], "triton": versions[1], "target": target,
                         "compiled": "not tried: needs ROCm's linker", "failed": 0})  # fmt: skip
            print(f"Triton {versions[1]} {target}: {rows[-1]['compiled']}", flush=True)
            continue
        found = [(record, fault) for record in records for fault in faults(record)]
        failed = {(record["module"], record["call"]) for record, _ in found}
        assert calls, "no call was compiled"
        for record, fault in found:
            print(f"FAULT Triton {versions[1]} {target} {record['module']}, {record['call']}: {fault}", flush=True)
        compiled = f"{len(calls - failed)} of {len(calls)} calls"
        print(f"Triton {versions[1]} {target}: {compiled} without a fault", flush=True)
        rows.append({"torch": versions[0], "triton": versions[1], "target": target, "compiled": compiled,
                     "failed": len(failed)})  # fmt: skip
    return rows


def limits_with(version: str) -> int:
    """0 if instructions, loads in flight and access widths stay within their limits."""
    environment = {"PYTHONPATH": str(triton_environment(version)), "FASTKL_LIMITS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernel_limits.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout[-4000:])
    print(f"Triton {version} limits: {done.stdout.strip().splitlines()[-1].strip('= ')}", flush=True)
    return int(done.returncode != 0)


def execute_with(version: str, module: str) -> str:
    """How many calls of bench/smoke.py were correct when `module` executed them (see emulated.py)."""
    parts = os.cpu_count() or 1
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    path = [str(triton_environment(version)), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    commands = [[sys.executable, str(ROOT / "tests" / "emulated.py"), module, str(n), str(parts)] for n in range(parts)]
    running = [subprocess.Popen(c, env=os.environ | environment, stdout=subprocess.PIPE, text=True) for c in commands]
    rows = [json.loads(line) for process in running for line in process.communicate()[0].splitlines()]
    for row in rows:
        if not row["ok"]:
            print(f"FAULT Triton {version}, executed: {row}", flush=True)
    if any(process.returncode for process in running):
        raise SystemExit(f"Triton {version}: the emulated calls did not end")
    executed = f"{sum(row['ok'] for row in rows)} of {len(rows)} calls"
    print(f"Triton {version} {EVERY_CALL}: {executed} executed right", flush=True)
    return executed


def test_with(version: str) -> dict:
    """Run the tests on another torch, with its own Triton. The first time this downloads about 3 GB."""
    folder = ENVIRONMENTS / f"torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True)
        wanted = [f"torch=={version}.*", "--editable", f"{ROOT}[test]"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / ".installed").touch()
    versions = subprocess.run(
        [python, "-c", "import torch, triton; print(torch.__version__, triton.__version__)"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    command = [python, "-m", "pytest", "-q", "--numprocesses", "auto", "--dist", "loadfile"]
    done = subprocess.run(
        [*command, *(str(ROOT / "tests" / name) for name in TESTS)], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-6000:])
    print(f"torch {versions[0]}, Triton {versions[1]}: {last}", flush=True)
    return {"torch": versions[0], "triton": versions[1], "tests": last.split(" in ")[0], "failed": done.returncode}


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def timed_on() -> dict[tuple[str, str], str]:
    """(version of Triton, target) -> the GPU on which bench/gpu.sh has run with it."""
    found = {}
    for path in sorted((ROOT / "bench" / "results").glob("*/about.json")):
        about = json.loads(path.read_text())
        if card := about["used"]:
            found[minor(about["packages"]["triton"]), f"sm_{card['major']}{card['minor']}"] = card["name"]
    return found


def merged(old: list[dict], new: list[dict], key: tuple[str, ...]) -> list[dict]:
    """The old rows, those with the same key replaced by the new ones; the key uses minor versions."""

    def name(row: dict) -> tuple:
        return tuple(minor(row[part]) for part in key)

    rows = {name(row): row for row in old}
    for row in new:
        rows[name(row)] = row
    places = {target: [place] for place, target in enumerate(TARGETS)}

    def order(at: tuple) -> list[list[int]]:
        return [places.get(part) or [int(number) for number in part.split(".")] for part in at]

    return [rows[at] for at in sorted(rows, key=order)]


def tables(results: dict) -> dict[str, str]:
    """Name of a table in docs/compatibility.md -> its text."""
    cards = timed_on()
    kernels = ["| torch | Triton | target | compiled | executed (emulated) | timed on |", "|---|---|---|---|---|---|"]
    for row in results["kernels"]:
        cells = [row["torch"], row["triton"], row["target"], row["compiled"], row.get("executed", ""),
                 cards.get((minor(row["triton"]), row["target"]), "")]  # fmt: skip
        kernels.append("| " + " | ".join(cell or "–" for cell in cells) + " |")
    tests = ["| torch | Triton | tests |", "|---|---|---|"]
    tests += [f"| {row['torch']} | {row['triton']} | {row['tests']} |" for row in results["tests"]]
    return {"kernels": "\n".join(kernels), "tests": "\n".join(tests)}


def write(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text()
    for name, text in tables(results).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, rest = page.split(begin)
        page = head + begin + text + "\n" + end + rest.split(end)[1]
    PAGE.write_text(page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="*", choices=TRITON, default=list(TRITON))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(USUAL))
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="as 2.8; about 3 GB each")
    parser.add_argument("--execute", metavar="MODULE", help="executes the PTX of each launch; see emulated.py")
    parser.add_argument("--write", action="store_true", help="into docs/compatibility.json and .md")
    options = parser.parse_args()
    kernels = [compile_with(version, options.targets) for version in options.triton]
    rows = [row for found in kernels for row in found or []]
    for row in rows:
        if row["target"] == EVERY_CALL:
            row["failed"] += limits_with(minor(row["triton"]))
        if options.execute and row["target"] == EVERY_CALL:
            row["executed"] = execute_with(minor(row["triton"]), options.execute)
            right, _, of, _ = row["executed"].split()
            row["failed"] += int(of) - int(right)
    tests = [test_with(version) for version in options.torch]
    if options.write:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"kernels": [], "tests": []}
        results["kernels"] = merged(results["kernels"], rows, ("triton", "target"))
        results["tests"] = merged(results["tests"], tests, ("torch",))
        write(results)
    failed = sum(row["failed"] for row in rows + tests) + kernels.count(None)
    print("all well" if not failed else "FAULTS, see above", flush=True)
    return bool(failed or not rows + tests)


if __name__ == "__main__":
    sys.exit(main())
