"""The one exception root. The command line prints its message as one line and exits with its code."""


class TouchlineError(Exception):
    """An error that the user can fix; the message says what, where and what to do.

    Attributes:
        exit_code: process exit code, 1 for a failed run.
    """

    exit_code = 1


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception's message on one line of at most `most` characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Diverged(TouchlineError):
    """The loss became NaN or infinite in training."""


class ParamsError(TouchlineError):
    """params.yaml or an argument of a command is invalid. Exit code 2, as for any usage error."""

    exit_code = 2
