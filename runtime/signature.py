"""The signature of a bundle, made and verified by OpenSSF's `model_signing`; here it is only found and described.

A signature covers the SHA-256 of every file, the manifest included, with a key or an identity. Which of them to trust
is not in the bundle, so srdeploy does not verify signatures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.errors import InputError

SIGNATURE = "model.sig"
"""Path inside the bundle: the name that model_signing writes by default."""

# By the verification material in the file: the method of model_signing, and the options that name who is trusted.
_METHODS = {
    "publicKey": ("key", ("--public_key", "key.pub")),
    "x509CertificateChain": ("certificate", ("--certificate_chain", "chain.pem")),
    "certificate": ("sigstore", ("--identity", "NAME", "--identity_provider", "URL")),
}


@dataclass(frozen=True)
class Signature:
    """A signature that was found and not verified.

    Attributes:
        file: path inside the bundle.
        method: "key", "certificate" or "sigstore", as model_signing calls them.
        verify_command: the command that verifies it; file names and identities in it are placeholders.
    """

    file: str
    method: str
    verify_command: tuple[str, ...]


def find_signature(bundle: Path) -> Signature | None:
    """Return the signature of a bundle, None if there is none.

    Raises:
        InputError: the file is not a Sigstore bundle, the format that model_signing writes.
    """
    path = bundle / SIGNATURE
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        method, trusted = next(_METHODS[key] for key in document["verificationMaterial"] if key in _METHODS)
        str(document["dsseEnvelope"]["payload"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"{path} is not a signature",
            expected="a Sigstore bundle as model_signing writes it",
            next_step="copy it again, or remove it",
        ) from error
    command = ("model_signing", "verify", method, *trusted, "--signature", str(path), str(bundle))
    return Signature(SIGNATURE, method, command)
