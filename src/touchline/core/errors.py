"""The one exception root. The command line prints its message as one line and exits with its code."""


class TouchlineError(Exception):
    """Something a person can mend; the message says what, where and what to do.

    Attributes:
        exit_code: process exit code, 1 for a failed run.
    """

    exit_code = 1


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, on one line of at most `most` characters; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Diverged(TouchlineError):
    """Training came to a loss that is no number."""


class ParamsError(TouchlineError):
    """params.yaml, or a command's argument, is not what is allowed. Exit code 2, as for any usage error."""

    exit_code = 2
