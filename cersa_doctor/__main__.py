"""`python -m cersa_doctor`, for environments without the `cersa` command."""

import sys

from cersa_doctor.entry import main

sys.argv.insert(1, "doctor")
main()
