"""Reports: one HTML file about one or several runs, from their directories alone."""

from trainer.report.page import write_report

__all__ = ["write_report"]
