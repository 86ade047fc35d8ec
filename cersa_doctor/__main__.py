"""`python -m cersa_doctor`, where the `cersa` command itself is not installed."""

import sys

from cersa_doctor.command import main

sys.argv.insert(1, "doctor")
main()
