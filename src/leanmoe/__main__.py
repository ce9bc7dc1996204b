"""`python -m leanmoe`."""

from leanmoe.cli import main

if __name__ == "__main__":  # processes that are started anew import this file, too
    main()
