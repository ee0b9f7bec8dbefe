"""The report of one evaluation: a single HTML file that needs neither network nor scripts."""

from carina.evaluate.report.page import build_report

__all__ = ["build_report"]
