"""Evidence to show: one self-contained HTML page per scan or erasure, and pictures of triggers."""

from lustral.report.figures import stamp_sheet
from lustral.report.page import ReportData, write_erase_report, write_scan_report

__all__ = ["ReportData", "stamp_sheet", "write_erase_report", "write_scan_report"]
