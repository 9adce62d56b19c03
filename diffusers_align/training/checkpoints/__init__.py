"""What outlives a run that is killed, and what may change when it goes on."""

from ...moved import as_before

__getattr__ = as_before(__name__)
