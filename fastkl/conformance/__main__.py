"""`python -m fastkl.conformance`: a table of which cases pass and fail."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys

import fastkl
from fastkl.conformance.cases import CASES
from fastkl.conformance.check import Outcome, check, in_words
from fastkl.conformance.libraries import LIBRARIES


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    if package == "fastkl":
        return fastkl.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def outcomes(name: str) -> list[Outcome]:
    answers = LIBRARIES[name][1]()
    asked = (check(case, answers[case.question]) for case in CASES if case.question in answers)
    return [outcome for outcome in asked if outcome is not None]


def lines(name: str, found: list[Outcome], markdown: bool) -> list[str]:
    title = f"{name} {version(LIBRARIES[name][0])}: {sum(each.passed for each in found)} of {len(found)} pass"
    rows = []
    for case, passed, answer in found:
        exact = ", ".join(f"{value:.6g}" for value in dict.fromkeys(case.exact))
        shows = "" if passed else case.shows
        rows.append(("" if passed else "FAIL", f"{case.question}: {case.name}", answer, exact, shows))
    head = ("", "case", "answer", "exact", "what it shows")
    if markdown:
        cells = [head, ("---",) * 5, *rows]
        texts = ([cell.replace("|", "\\|") for cell in row] for row in cells)  # a bar would end the cell
        return [f"### {title}", "", *("| " + " | ".join(row) + " |" for row in texts), ""]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(5)]
    return [title, *("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [head, *rows]), ""]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkl.conformance", description=__doc__)
    known = f"of {', '.join(LIBRARIES)} (default: what is installed)"
    parser.add_argument("libraries", nargs="*", metavar="library", help=known)
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.libraries if name not in LIBRARIES]
    missing = [name for name in options.libraries if name in LIBRARIES and version(LIBRARIES[name][0]) is None]
    if unknown or missing:
        parser.error(f"{'no such library' if unknown else 'not installed'}: {', '.join(unknown or missing)}")
    failed = False
    for name in options.libraries or [name for name, (package, _) in LIBRARIES.items() if version(package)]:
        try:
            found = outcomes(name)
        except Exception as error:  # the library cannot be imported, or lacks what is asked; the others can answer
            failed, title = True, f"{name} {version(LIBRARIES[name][0])}: no answers"
            text = [f"### {title}" if options.markdown else title, "", f"    {in_words(error)}", ""]
        else:
            failed |= not all(each.passed for each in found)
            text = lines(name, found, options.markdown)
        print("\n".join(text), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
