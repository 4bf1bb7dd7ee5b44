"""What can end a scoring job before its last row. Every message is a sentence for the person who started it."""

from topfive.errors import TopfiveError


class ScoringError(TopfiveError):
    """The job was refused or stopped; nothing that was saved is lost."""


class RefusedError(ScoringError):
    """Nothing was scored: the command, the folder or an earlier job's state does not allow it."""

    exit_code = 2


class StoppedError(ScoringError):
    """The job stopped before its end; what it had scored is saved, and the same command goes on from there."""

    exit_code = 4


class ServerGoneError(StoppedError):
    """Stopped because the server did not answer for too long."""

    exit_code = 3


class InterruptedJobError(StoppedError):
    """Stopped because it was asked to (Ctrl-C, SIGTERM)."""

    exit_code = 130
