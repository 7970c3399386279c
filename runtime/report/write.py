"""Write and read reports: report.json by the published schema, report.html, and the crops next to them."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_folder
from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra
from srdeploy.runtime.report.document import KIND, SCHEMA
from srdeploy.runtime.report.page import page

JSON_NAME = "report.json"
HTML_NAME = "report.html"


def schema() -> dict[str, Any]:
    """Return the published JSON schema of report.json."""
    text = (Path(__file__).parent / "report.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def write_report(document: Mapping[str, Any], folder: Path, *, force: bool = False) -> Path:
    """Write report.json, report.html and crops/ into a folder, whole or not at all.

    Args:
        document: as `report_document` returns it, its pictures inside; or as `read_report` returns it.
        folder: made, with everything in it; an existing one is replaced when `force` is true.
        force: replace an existing folder.

    Returns:
        The path of report.html.

    Raises:
        UsageError: the folder exists and `force` is false, or it is no report.
        OutputError: it cannot be written.
        MissingExtraError: jinja2 or jsonschema is not installed.
    """
    stored = {**document, "pictures": {key: _without_data(entry) for key, entry in document["pictures"].items()}}
    check_document(stored, name="the report")
    pictures = {key: base64.b64decode(entry["data"]) for key, entry in document["pictures"].items()}
    html = page(document, pictures)
    with atomic_folder(folder, force=force, known_by=JSON_NAME) as temporary:
        (temporary / "crops").mkdir()
        for key, entry in stored["pictures"].items():
            (temporary / entry["file"]).write_bytes(pictures[key])
        text = json.dumps(stored, indent=1, ensure_ascii=False, allow_nan=False)
        (temporary / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        (temporary / HTML_NAME).write_text(html, encoding="utf-8")
    return folder / HTML_NAME


def read_report(path: Path, *, with_pictures: bool = False) -> dict[str, Any]:
    """Read a report back.

    Args:
        path: report.json, its folder, or a bundle that holds a report folder.
        with_pictures: read the pictures too, so that the page can be written again.

    Raises:
        InputError: there is no report, or it is not one of this schema.
    """
    file = _report_file(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file} is not readable as JSON ({error})", expected="a report.json") from error
    check_document(document, name=str(file))
    if with_pictures:
        for entry in document["pictures"].values():
            try:
                data = (file.parent / entry["file"]).read_bytes()
            except OSError as error:
                raise InputError(
                    f"{file.parent / entry['file']} is missing", next_step="copy the whole folder again"
                ) from error
            entry["data"] = base64.b64encode(data).decode("ascii")
    loaded: dict[str, Any] = document
    return loaded


def check_document(document: Any, *, name: str) -> None:
    """Check a document against the published schema.

    Raises:
        InputError: it is not a report, or of another schema, or misses something; `name` says which.
    """
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError(f"{name} is not a srdeploy report", expected="a report.json")
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{name} has report schema {document.get('schema')}",
            expected=f"schema {SCHEMA}",
            next_step="make it again with verify, bench or deploy of this version",
        )
    jsonschema: Any = import_extra("jsonschema", "report")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if error is not None:
        raise InputError(f"{name} breaks the report schema at {error.json_path}: {error.message[:200]}")


def _report_file(path: Path) -> Path:
    for candidate in (path, path / JSON_NAME, path / "report" / JSON_NAME):
        if candidate.is_file():
            return candidate
    raise InputError(f"{path} holds no report", expected=f"{JSON_NAME}, a folder with it, or a bundle")


def _without_data(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "data"}
