"""The errors that qsearch raises on purpose.

Every message says what was expected, what came and what to do next. The command line prints the message
alone; anything that is not a QSearchError is a defect and keeps its traceback.
"""

__all__ = [
    "BuildError",
    "BundleCorruptError",
    "BundleError",
    "CalibrationError",
    "DataError",
    "MeasureError",
    "QSearchError",
    "QuantizeError",
    "SpaceError",
    "StudyError",
    "StudyMismatchError",
    "TargetMismatchError",
    "ToolchainError",
    "TrialError",
    "UnsupportedModelError",
    "UntrustedError",
    "UsageError",
]


class QSearchError(Exception):
    """Base of every error a user can meet; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(QSearchError):
    """The request cannot be carried out as written."""

    exit_code = 2


class SpaceError(UsageError):
    """A search space file or a configuration is malformed or impossible."""


class UnsupportedModelError(UsageError):
    """The model cannot be found, loaded or imported."""


class DataError(UsageError):
    """The images or labels cannot be used."""


class UntrustedError(UsageError):
    """Code that this user has not made, a bundle's library for instance, is not run unasked."""


class TrialError(QSearchError):
    """A single configuration failed; the study goes on."""


class CalibrationError(TrialError):
    """No usable activation range could be derived."""


class QuantizeError(TrialError):
    """A layer cannot be represented in the asked precision."""


class BuildError(TrialError):
    """A kernel or module could not be compiled."""


class MeasureError(TrialError):
    """A compiled module could not be run or measured."""


class ToolchainError(QSearchError):
    """A tool that every trial needs is missing."""


class StudyError(QSearchError):
    """The study cannot be read, written or continued."""


class StudyMismatchError(StudyError):
    """The study was made with another model, data set, target or search space."""


class BundleError(QSearchError):
    """A bundle cannot be written, read or run."""


class BundleCorruptError(BundleError):
    """A bundle does not match its checksums or its recorded outputs."""


class TargetMismatchError(BundleError):
    """A bundle was compiled for a machine other than this one."""
