"""`python -m fedcmp`."""

from fedcmp.cli import run

run()
