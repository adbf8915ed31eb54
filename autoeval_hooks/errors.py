"""The errors of autoeval. Each message is one line that names the file, the key and the remedy."""

from __future__ import annotations


class AutoEvalError(Exception):
    """Base of all errors that autoeval raises on purpose.

    `kind` tells a runner what to do with a ticket that failed so: ``transient`` is tried again,
    ``checkpoint`` and ``configuration`` are not, since another try would meet the same fault.
    """

    kind = "transient"


class ConfigError(AutoEvalError, ValueError):
    """A configuration that cannot be used."""

    kind = "configuration"


class CheckpointError(AutoEvalError):
    """A checkpoint that is incomplete, has changed, or cannot be evaluated."""

    kind = "checkpoint"


class IncompleteError(CheckpointError):
    """A checkpoint whose save is not over, or was cut off; for who watches it being written, it may be later."""


class TicketError(AutoEvalError, ValueError):
    """A ticket that is torn, hostile, or written by a newer version. It is quarantined, never executed."""

    kind = "checkpoint"


class QueueError(AutoEvalError):
    """A queue directory that cannot serve as one."""

    kind = "configuration"
