"""Errors a user can act on. Commands print the message as one line and exit with code 2."""


class TrimKVError(Exception):
    """Base class: the message names what was given, what is allowed and what to do."""


class ConfigError(TrimKVError, ValueError):
    """A setting is out of range or contradicts another one."""


class BudgetError(ConfigError):
    """A budget cannot be honoured (too small for one chunk, or larger than the memory or disk at hand)."""


class ModelError(TrimKVError):
    """A model, its weights, its tokenizer or its gates are missing, unsupported or do not fit together."""


class ArtefactError(TrimKVError):
    """An artefact folder is missing, damaged, or of a schema this version does not read."""


class PositionLimitError(TrimKVError):
    """The stream would pass the last position at which the artefact's results are right."""


class StateError(TrimKVError):
    """A cache state does not fit the engine, or a step was asked for at a moment it is not allowed."""


class SessionError(TrimKVError):
    """A session file is missing, damaged, in use, or of another artefact, or a stream cannot go back that far."""


class VerificationError(TrimKVError):
    """An exported artefact does not agree with the eager model it was made from."""


class HubError(TrimKVError):
    """The model hub cannot be reached, does not know the token, or refuses an upload."""


def reason(error: Exception) -> str:
    """What went wrong, in words: of a failed system call without its number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def first_line(error: Exception) -> str:
    """What went wrong, of libraries that tell it at length; the kind of error if they tell nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
