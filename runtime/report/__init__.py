"""The report: one JSON document with a published schema, and a page that shows it to people."""
