"""The errors that a user may see."""


class TreeLoRAError(Exception):
    """A mistake that the user can mend: the message names the file, row or key, the value and the remedy."""


class ConfigError(TreeLoRAError):
    """A configuration that can't be run."""


class DataError(TreeLoRAError):
    """Data that can't be used."""


class LostError(TreeLoRAError):
    """Something was lost that a restart from the last commit brings back, such as an actor that died."""


class CheckpointError(TreeLoRAError):
    """A checkpoint that is incomplete, altered or not ours."""


def one_line(error: BaseException, length: int = 300) -> str:
    """What an error says, on one line of at most so many letters; its type where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__
