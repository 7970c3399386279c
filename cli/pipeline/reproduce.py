"""The commands, stage by stage, that make a bundle's files again: reproduce.sh, and the report's last section."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from srdeploy.core.manifest import Source


def reproducing_lines(
    *, checkpoint: Source, inputs: Mapping[str, Path], whole: Sequence[str], stages: Sequence[Sequence[str]]
) -> list[str]:
    """Return lines of a shell script that makes the files of a bundle again.

    Args:
        checkpoint: the file it starts from; the script checks its SHA-256.
        inputs: shell variable to the path it stands for; stages refer to them as "$NAME" and to the output folder as
            "$OUT".
        whole: the one command that made the bundle.
        stages: the same, verb by verb.
    """
    return [
        "# In one command:",
        f"#   {shlex.join(whole)}",
        "# Stage by stage; the variables may be set from outside:",
        'OUT="${1:-reproduced}"',
        *(f'{name}="${{{name}:-{_quoted_inside(value)}}}"' for name, value in inputs.items()),
        f'echo "{checkpoint.sha256}  $CHECKPOINT" | sha256sum --check --quiet',
        *(_command(words) for words in stages),
    ]


def write_reproduce_script(path: Path, lines: Sequence[str], *, versions: Mapping[str, str]) -> None:
    """Write an executable script.

    Args:
        path: where.
        lines: of `reproducing_lines`.
        versions: of the packages that took part.
    """
    whole = [
        "#!/usr/bin/env bash",
        "# Makes the files of this bundle again. Usage: reproduce.sh [FOLDER]",
        "# Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "set -euo pipefail",
        "",
        *lines,
    ]
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    path.chmod(0o755)


def _command(words: Sequence[str]) -> str:
    """Quote every word, but let the variables in "$NAME" and "$OUT/..." words work."""
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)


def _quoted_inside(path: Path) -> str:
    """Escape a path for the inside of "${NAME:-...}"."""
    return "".join("\\" + letter if letter in '"$`\\}' else letter for letter in str(path.resolve()))
