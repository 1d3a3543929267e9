"""The claims this library makes, and the code that tests each."""

from commissure.experiments.claims import CLAIMS, Bound, Claim, Context, Cost, Outcome, Row
from commissure.experiments.runner import reproduce

__all__ = ["CLAIMS", "Bound", "Claim", "Context", "Cost", "Outcome", "Row", "reproduce"]
