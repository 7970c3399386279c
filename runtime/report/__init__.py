"""The report: one JSON document with a published schema, and a page that shows it to people."""

from srdeploy.runtime.report.document import EngineEntry, report_document
from srdeploy.runtime.report.write import read_report, write_report

__all__ = ["EngineEntry", "read_report", "report_document", "write_report"]
