"""What a run leaves for people: evaluations, pictures, comparisons, the model card, the Hub."""

from ...moved import as_before

__getattr__ = as_before(__name__)
