"""Evidence to show: one self-contained HTML page per scan or erasure, and pictures of triggers."""

from lustral.report.page import ReportData, write_erase_report, write_scan_report
from lustral.vision.figures import stamp_sheet

__all__ = ["ReportData", "stamp_sheet", "write_erase_report", "write_scan_report"]
