"""Names files that are not readable images, and strips metadata from PNG files."""

from __future__ import annotations

import re
import zlib

__all__ = ["AVIF", "HEIC", "name_contents", "without_png_metadata"]

AVIF, HEIC = "an AVIF image", "a HEIC image"
"""Names that `name_contents` gives these formats."""

_CONVERT = "convert it to JPEG or PNG"
_UNPACK = "unpack it, or pack its files as an uncompressed .tar"
_CONTENTS: tuple[tuple[str, str, str], ...] = (
    (r".{4}ftyp(avif|avis)", AVIF, _CONVERT),
    (r".{4}ftyp(mif1|msf1).{4}.{0,64}?avi[fs]", AVIF, _CONVERT),
    (r".{4}ftyp(hei|hev|mif1|msf1)", HEIC, _CONVERT),
    (r".{4}ftypcrx ", "a Canon raw image", _CONVERT),
    (r".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video", "extract its frames first"),
    (r"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", _CONVERT),
    (r"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image", _CONVERT),
    (r"8BPS", "a Photoshop file", _CONVERT),
    (r"P[1-7]\s", "a PNM image (PPM, PGM, PBM)", _CONVERT),
    (r"\0\0\x01\0", "an icon", _CONVERT),
    (r"DDS ", "a DDS texture", _CONVERT),
    (r"qoif", "a QOI image", _CONVERT),
    (r"v/1\x01", "an OpenEXR image", _CONVERT),
    (r"#\?RADIANCE", "a Radiance HDR image", _CONVERT),
    (r"SIMPLE  =", "a FITS image", _CONVERT),
    (r".{128}DICM", "a DICOM image", _CONVERT),
    (r"%PDF-", "a PDF document", "extract its images first"),
    (r"%!PS|\xc5\xd0\xd3\xc6", "PostScript", _CONVERT),
    (r"version https://git-lfs\.github\.com/", "a Git LFS pointer, not the file itself", "run git lfs pull there"),
    (r"(\.\./.{0,200})?/annex/objects/", "a git-annex pointer, not the file itself", "run git annex get there"),
    (r"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.{0,500}?-->\s*)?(<!DOCTYPE svg.{0,300}?>\s*)?<svg", "an SVG drawing", _CONVERT),
    (r"(?i)\s*(<!doctype html|<html)", "an HTML page", "download the image itself"),
    (r"PK\x03\x04|PK\x05\x06", "a zip archive", _UNPACK),
    (r"Rar!\x1a|7z\xbc\xaf\x27\x1c", "an archive", _UNPACK),
    (r"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd", "a compressed file", "decompress it"),
    (r"\x93NUMPY", "a NumPy array", "write its images to files, or pass arrays to FeatureExtractor.embed"),
    (r"\x89HDF\r\n", "an HDF5 file", "write its images to files"),
    (r"PAR1", "a Parquet file", "name it FILE.parquet"),
    (r".{257}ustar", "a tar archive", "name it FILE.tar"),
    (r"\0+\Z", "nothing but zeros, as a download that was cut off leaves", "copy it again"),
)
_PATTERNS = [(re.compile(pattern.encode(), re.DOTALL), what, fix) for pattern, what, fix in _CONTENTS]
_HEAD = 1024

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
_TURNING = {b"Raw profile type exif", b"XML:com.adobe.xmp"}
"""PNG texts in which Pillow looks for an orientation."""
_MOST_TEXT = 2**20


def name_contents(data: bytes) -> tuple[str, str] | None:
    r"""Names a file's type and how to convert it, or returns None if its first bytes do not identify it.

    JPEG, PNG, WebP, GIF, BMP and TIFF give None.

    >>> name_contents(b"PK\x03\x04...")[0]
    'a zip archive'
    """
    head = data[:_HEAD]
    return next(((what, fix) for pattern, what, fix in _PATTERNS if pattern.match(head)), None)


def without_png_metadata(data: bytes) -> bytes:
    """Strips a PNG file of chunks that do not change its picture. Other files stay as they are.

    Pillow refuses files with large or damaged texts and profiles, but does not need them for the picture. Chunks with
    an orientation stay, up to 1 MiB. Animations become their first frame.
    """
    if not data.startswith(_PNG):
        return data
    kept, at, dropped = [_PNG], len(_PNG), False
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        is_critical = not kind[0] & 32
        if is_critical or kind in _PICTURE or _tells_orientation(kind, data[at + 8 : end - 4]):
            kept.append(data[at:end])
        else:
            dropped = True
        at = end
    return b"".join([*kept, data[at:]]) if dropped else data


def _tells_orientation(kind: bytes, body: bytes) -> bool:
    if kind not in {b"tEXt", b"zTXt", b"iTXt"} or len(body) > _MOST_TEXT:
        return False
    keyword, _, text = body.partition(b"\0")
    if keyword not in _TURNING:
        return False
    if kind == b"iTXt":
        compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    else:
        compressed, text = kind == b"zTXt", text[1:] if kind == b"zTXt" else text
    if not compressed:
        return True
    try:
        inflate = zlib.decompressobj()
        inflate.decompress(text, _MOST_TEXT - 1)
    except zlib.error:
        return False
    return inflate.eof
