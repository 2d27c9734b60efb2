"""Errors that end a run early."""


class NonFiniteLossError(Exception):
    """The loss or its gradient is no longer finite; the message names the step's traces."""


class DivergedLossError(Exception):
    """The loss has grown tenfold and stayed there; the message says what to change."""


class OutOfMemoryError(Exception):
    """The device or the machine has no memory left; the message says what to lower."""


class StageFailedError(Exception):
    """A command of some rounds failed; the message names it and its last line."""


class InterruptedRunError(Exception):
    """The run was asked to stop and has written a checkpoint.

    Attributes:
        signal_number: Signal that asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """Exit code of the program."""
        return 128 + self.signal_number
