"""The report: what a reproduction found, as JSON, a terminal table, one self-contained HTML file, and README rows."""

from commissure.report.results import Bound, Entry, Report, Row, number

__all__ = ["Bound", "Entry", "Report", "Row", "number"]
