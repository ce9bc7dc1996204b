"""The one error that leanmoe raises for anything a user can put right."""


class LeanMoeError(Exception):
    """Names the thing that is wrong, its value, and what is allowed, in one line.

    The command line prints the message alone and exits with status 1; `--debug` adds the traceback.
    """
