"""`python -m leanmoe`."""

from leanmoe.cli import main

main()
