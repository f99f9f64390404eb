"""The one exception type for what a user can put right."""


class UsageError(ValueError):
    """Bad input from the user: the message says what came, what is allowed and what to do.

    The command line prints it as one line and exits with code 2; in Python it is an ordinary `ValueError`.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error` on one line, cut to `limit` characters."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + '...'
