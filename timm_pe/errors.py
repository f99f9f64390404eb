"""The exception types that the command line prints as one line."""


class UsageError(ValueError):
    """Bad input from the user: the message gives the value, what is allowed and what to do.

    The command line prints it as one line and exits with code 2; in Python it is an ordinary `ValueError`.
    """


class NoPretrainedWeights(UsageError):
    """The pretrained weights of a model name cannot be loaded."""


class RunError(RuntimeError):
    """A run that cannot continue although its input was valid: the message says why, what is intact and what to do.

    The command line prints it as one line and exits with code 1.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory; PyTorch has a type for it on a device alone."""
    return type(error).__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error` on one line, cut to `limit` characters; of a loader worker's error, the original one."""
    text = str(error)
    if 'Original Traceback (most recent call last)' in text:
        text = text.rstrip().rsplit('\n', 1)[-1].split(': ', 1)[-1]
    text = ' '.join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + '...'
