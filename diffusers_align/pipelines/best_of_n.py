"""stub"""
from .base import WrappedPipeline
class BestOfNPipeline(WrappedPipeline):
    """x"""
