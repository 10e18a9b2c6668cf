"""Quoting the error of another library inside a one-line message of ours."""


def one_line(error: BaseException, length: int = 300) -> str:
    """First ``length`` characters of an error's message, without line breaks."""
    return " ".join(str(error).split())[:length] or type(error).__name__
