"""A program: prints `PASSED FAILED SKIPPED` of a junit report, for the sum that `tests/run` ends with."""

from __future__ import annotations

import sys
from xml.etree import ElementTree


def main() -> None:
    suites = ElementTree.parse(sys.argv[1]).getroot().iter("testsuite")
    total = failed = skipped = 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    print(max(total - failed - skipped, 0), failed, skipped)


if __name__ == "__main__":
    main()
