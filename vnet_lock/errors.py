"""One family of errors: a subclass for each different reaction of a caller, with its exit code."""

from __future__ import annotations


class VnetLockError(Exception):
    """Something failed; the message names object, cause and next step."""

    exit_code = 1


class BadInput(VnetLockError):
    """XML, a command line, a config or an argument that cannot be understood."""

    exit_code = 2


class Refused(VnetLockError):
    """What was asked for is held by another; ``holder`` says by whom, in words."""

    exit_code = 4

    def __init__(self, message: str, *, resource: str = "", holder: str = "") -> None:
        super().__init__(message)
        self.resource = resource
        self.holder = holder


class Unsupported(VnetLockError):
    """This host, kernel or device cannot do what was asked for."""

    exit_code = 5


class Vanished(VnetLockError):
    """A device that was there a moment ago is gone."""
