"""Open whichever kind of checkpoint a file is. The first bytes and the entries decide, never the file's name."""

from pathlib import PurePosixPath

from srdeploy.models.checkpoint.archive import Archive
from srdeploy.models.checkpoint.arrays import tensor_of_npy
from srdeploy.models.checkpoint.container import Container
from srdeploy.models.checkpoint.exported_program import is_exported_program, open_exported_program
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown
from srdeploy.models.checkpoint.safetensors_file import open_safetensors
from srdeploy.models.checkpoint.torch_files import MAGIC_NUMBER, no_storage_data, open_stream, open_zip

_AGAIN = "copy or download the file again"


def open_container(file: FileBytes) -> Container:
    """Open a checkpoint file of any kind.

    Raises:
        RefusedError: it is of no known kind, or it is damaged or hostile.
    """
    head = file.read(0, min(file.size, 512), "head")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _open_archive(file)
    if head[8:9] == b"{":
        return open_safetensors(file)
    if head[:1] == b"\x80" or head.startswith(b"L%dL\n" % MAGIC_NUMBER):  # protocol 2 and later, or the first two
        return open_stream(file)
    raise _not_a_checkpoint(head)


def _open_archive(file: FileBytes) -> Container:
    """Open a zip archive: of torch.save, of torch.export, or of NumPy arrays."""
    archive = Archive(file)
    names = archive.entries
    last_parts = {name: PurePosixPath(name).name for name in names}
    if "constants.pkl" in last_parts.values():
        raise RefusedError(
            "is a TorchScript archive, which holds a program",
            expected="a checkpoint written by torch.save",
            next_step=(
                "python -c 'import sys, torch; torch.save(torch.jit.load(sys.argv[1]).state_dict(), sys.argv[2])' "
                "FILE weights.pth"
            ),
        )
    if is_exported_program(archive):
        return open_exported_program(archive)
    folders = [name.removesuffix("data.pkl") for name, last in last_parts.items() if last == "data.pkl"]
    if len(folders) == 1:
        return open_zip(archive, folders[0])
    if names and all(name.endswith(".npy") for name in names):
        return _open_npz(archive)
    inner = next((name for name in names if name.endswith((".pth", ".pt", ".tar", ".ckpt", ".safetensors"))), None)
    raise RefusedError(
        "is a zip archive, but not one that torch.save wrote",
        expected="one entry NAME/data.pkl",
        next_step=f"unpack it and pass the file {shown(inner)} inside" if inner else _AGAIN,
    )


def _open_npz(archive: Archive) -> Container:
    """Open what numpy.savez wrote: one .npy file per array."""
    arrays = {name.removesuffix(".npy"): tensor_of_npy(name, bytes(archive.read(name))) for name in archive.entries}
    return Container("NumPy archive", arrays, no_storage_data)


# ----------------------------------------------------------------------------------------------------------------------
# Files of other kinds

_OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"\x1f\x8b", "is a gzip file", "unpack it first"),
    (b"\xfd7zXZ", "is an xz file", "unpack it first"),
    (b"BZh", "is a bzip2 file", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is a Zstandard file", "unpack it first"),
    (
        b"\x93NUMPY",
        "is a NumPy file of one array",
        "if it holds a dict and you trust it: python -c 'import numpy, sys; "
        "numpy.savez(sys.argv[2], **numpy.load(sys.argv[1], allow_pickle=True).item())' FILE weights.npz",
    ),
    (b"\x89HDF", "is an HDF5 (Keras) file", "convert its weights to a PyTorch state_dict first"),
    (b"\x89PNG", "is a PNG image", "pass the checkpoint first and images with their own option"),
    (b"\xff\xd8\xff", "is a JPEG image", "pass the checkpoint first and images with their own option"),
    (b"7z\xbc\xaf", "is a 7-Zip archive", "unpack it first"),
    (b"Rar!", "is a RAR archive", "unpack it first"),
    (b"MATLAB 5.0", "is a MATLAB file", "convert its weights to a PyTorch state_dict first"),
)


def _not_a_checkpoint(head: bytes) -> RefusedError:
    expected = "a checkpoint written by torch.save, or safetensors"
    for magic, what, step in _OTHER_FILES:
        if head.startswith(magic):
            return RefusedError(what, expected=expected, next_step=step)
    if head[257:262] == b"ustar":
        return RefusedError("is a tar archive", expected=expected, next_step="unpack it and pass the file inside")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return RefusedError("is a web page: the download went wrong", expected=expected, next_step="download it again")
    if not head.strip(b"\0"):
        return RefusedError("holds only zeros: the download or copy went wrong", expected=expected, next_step=_AGAIN)
    return RefusedError("is not a checkpoint", expected=expected)
