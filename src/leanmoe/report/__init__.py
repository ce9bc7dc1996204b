"""The page: plots and tables from saved results only, in one file that needs no network."""

from leanmoe.report.page import write_report

__all__ = ["write_report"]
