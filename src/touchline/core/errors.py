"""The one exception root. The command line prints its message as one line and exits with its code."""


class TouchlineError(Exception):
    """Something a person can mend; the message says what, where and what to do.

    Attributes:
        exit_code: process exit code, 1 for a failed run.
    """

    exit_code = 1


class Diverged(TouchlineError):
    """Training came to a loss that is no number."""


class ParamsError(TouchlineError):
    """params.yaml, or a command's argument, is not what is allowed. Exit code 2, as for any usage error."""

    exit_code = 2
