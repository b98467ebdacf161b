"""Training's errors: a class exists only where the reaction differs.

TrainError
├── DataError      the pictures will not do: mend the data folder
└── UsageError     wrong usage (exit 2): a recipe, a setting, a path or a score kind that does not exist or fit
"""

from kizu_contract.errors import KizuError


class TrainError(KizuError):
    """A run or a training that cannot be used; the message says what, where and what to do."""


class DataError(TrainError):
    """A data folder holds too little, or not what its layout promises."""


class UsageError(TrainError):
    """The command was given something it does not know; the message lists what is known."""
