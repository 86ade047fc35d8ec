"""Importing the package on systems that are not like the one of the tests."""

import subprocess
import sys

# Modules of Python that only exist on POSIX systems.
WITHOUT_POSIX = """
import importlib, pkgutil, sys

POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog"}
# The standard library and the other libraries know both kinds of systems and have asked already; the package has not.
import cersa_diffusion.training, cersa_diffusion.metrics, matplotlib.pyplot, datasets

for name in [name for name in sys.modules if name.split(".")[0] in ("cersa_diffusion", "cersa_doctor")]:
    del sys.modules[name]
for name in POSIX_ONLY:
    sys.modules[name] = None

import cersa_diffusion, cersa_doctor

for package in (cersa_diffusion, cersa_doctor):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


def test_no_module_needs_a_posix_system_to_be_imported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"cersa_diffusion.training.run.memory", "cersa_diffusion.cli.command", "cersa_doctor.report"} <= set(
        done.stdout.split()
    )
