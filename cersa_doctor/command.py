"""`cersa doctor`: its options and what it prints."""

import argparse
import json
import sys

HELP = "report what is installed, what works, and how to repair the rest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `cersa doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; returns the exit status, 1 if something will not work."""
    try:
        from cersa_doctor.report import examine
    except ImportError as error:
        print(f"the doctor itself needs packaging ({error}): pip install packaging", file=sys.stderr)
        return 1
    report = examine()
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report)
    return 1 if report.problems else 0
