"""reproduce.sh: the commands, stage by stage, that make a bundle's files again."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from srdeploy.core.manifest import Source


def write_reproduce_script(
    path: Path,
    *,
    checkpoint: Source,
    inputs: Mapping[str, Path],
    whole: Sequence[str],
    stages: Sequence[Sequence[str]],
    versions: Mapping[str, str],
) -> None:
    """Write an executable script.

    Args:
        path: where.
        checkpoint: the file it starts from; the script checks its SHA-256.
        inputs: shell variable to the path it stands for; stages refer to them as "$NAME" and to the output folder as
            "$OUT".
        whole: the one command that made the bundle.
        stages: the same, verb by verb.
        versions: of the packages that took part.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Makes the files of this bundle again, stage by stage. In one command it was:",
        f"#   {shlex.join(whole)}",
        "# Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "#",
        "# Usage: reproduce.sh [FOLDER]; the variables below may be set from outside.",
        "set -euo pipefail",
        'OUT="${1:-reproduced}"',
        *(f'{name}="${{{name}:-{_quoted_inside(value)}}}"' for name, value in inputs.items()),
        "",
        f'echo "{checkpoint.sha256}  $CHECKPOINT" | sha256sum --check --quiet',
        *(_command(words) for words in stages),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)


def _command(words: Sequence[str]) -> str:
    """Quote every word, but let the variables in "$NAME" and "$OUT/..." words work."""
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)


def _quoted_inside(path: Path) -> str:
    """Escape a path for the inside of "${NAME:-...}"."""
    return "".join("\\" + letter if letter in '"$`\\}' else letter for letter in str(path.resolve()))
