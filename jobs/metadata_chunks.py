"""Metadata in an image file's bytes: put beside the pixels, which are not encoded again.

PNG gets two `iTXt` chunks behind `IHDR` (PNG specification, third edition, 11.3.3.4); JPEG two
`APP1` segments behind JFIF's (Exif 2.32, 4.7.2; XMP part 3, 1.1.3); WebP its extended form with the
chunks `EXIF` and `XMP ` (RFC 9649). Exif keeps the document as ASCII in `UserComment`.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping

from PIL import Image

from jobs import png

KEYWORD = "zimage"
"""Of the PNG chunk with the document."""
MAX_TEXT = 60_000
"""Characters of the document as ASCII: a JPEG segment has 65,533 bytes."""

_XMP_KEYWORD = "XML:com.adobe.xmp"
_AFTER_IHDR = 33  # signature 8, length 4, kind 4, data 13, checksum 4
_APP0, _APP1 = 0xFFE0, 0xFFE1
_MAX_SEGMENT = 65_535  # its own two bytes of length included
_EXIF_ID, _XMP_ID = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_EXIF_FLAG, _XMP_FLAG = 0x08, 0x04
_SOFTWARE, _EXIF_IFD, _EXIF_VERSION, _USER_COMMENT = 0x0131, 0x8769, 0x9000, 0x9286
_ASCII, _LONG, _UNDEFINED = 2, 4, 7  # types of Exif's values
_ASCII_TEXT = b"ASCII\0\0\0"
_DECODED = ("PNG", "JPEG", "WEBP")


def add_metadata(
    content: bytes, *, document: Mapping[str, object], xmp: str, software: str
) -> bytes:
    """An image file with a JSON document and an XMP packet; its pixels' bytes are as they were.

    Args:
        content: PNG, JPEG or lossy WebP as the writers of this project make them, without metadata.
        document: at most `MAX_TEXT` characters, written as ASCII.
        xmp: the packet.
        software: ASCII, who made the file.

    Raises:
        ValueError: another kind of file, or more than fits.
    """
    text = json.dumps(document)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters of metadata; allowed: {MAX_TEXT}")
    packet = xmp.encode()
    if content[12:16] == b"IHDR":
        readable = json.dumps(document, ensure_ascii=False)
        added = (*_international_text(KEYWORD, readable), *_international_text(_XMP_KEYWORD, xmp))
        return b"".join((content[:_AFTER_IHDR], *added, content[_AFTER_IHDR:]))
    if content[:2] == b"\xff\xd8":
        marker, length = struct.unpack(">HH", content[2:6])
        at = 4 + length if marker == _APP0 else 2
        exif = _segment(_EXIF_ID + _exif(text, software))
        return b"".join((content[:at], exif, _segment(_XMP_ID + packet), content[at:]))
    if content[:4] == b"RIFF" and content[8:16] == b"WEBPVP8 ":
        return _extended_webp(content, _exif(text, software), packet)
    raise ValueError(f"a file that begins with {content[:16]!r}; allowed: PNG, JPEG, lossy WebP")


def read_text(content: bytes) -> str | None:
    """The document of `add_metadata` as text, also where another program has moved it; or None.

    Raises:
        OSError: no PNG, JPEG or WebP, or one whose metadata is damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_DECODED) as image:
            if image.format == "PNG":
                image.load()  # chunks may follow the pixels
                found = image.info.get(KEYWORD)
                return None if found is None else str(found)
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except OSError:
        raise
    except Exception as error:  # on hostile bytes decoders raise nearly anything
        raise OSError(f"damaged: {type(error).__name__}: {error}") from error
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII_TEXT):
        return None
    return comment[len(_ASCII_TEXT) :].decode("ascii", "replace")


def _international_text(keyword: str, text: str) -> tuple[bytes, bytes, bytes, bytes]:
    """An `iTXt` chunk, not compressed, of no language."""
    return png.chunk(b"iTXt", keyword.encode() + b"\0\0\0\0\0" + text.encode())


def _segment(data: bytes) -> bytes:
    length = 2 + len(data)
    if length > _MAX_SEGMENT:
        raise ValueError(f"{length} bytes of metadata; a JPEG segment has up to {_MAX_SEGMENT}")
    return struct.pack(">HH", _APP1, length) + data


def _extended_webp(content: bytes, exif: bytes, xmp: bytes) -> bytes:
    """The same image data in a file that says in front that it has metadata behind."""
    # A key frame's header: 3 bytes of frame tag, the start code, then both sides (RFC 6386, 9.1).
    if content[23:26] != b"\x9d\x01\x2a":
        raise ValueError("a WebP file whose image data begins with no key frame")
    width, height = (side & 0x3FFF for side in struct.unpack("<HH", content[26:30]))
    header = struct.pack("<I", _EXIF_FLAG | _XMP_FLAG)
    header += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = (
        *_riff_chunk(b"VP8X", header),
        content[12:],
        *_riff_chunk(b"EXIF", exif),
        *_riff_chunk(b"XMP ", xmp),
    )
    size = 4 + sum(map(len, chunks))
    return b"".join((b"RIFF", struct.pack("<I", size), b"WEBP", *chunks))


def _riff_chunk(kind: bytes, data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return kind, struct.pack("<I", len(data)), data, b"\0" * (len(data) % 2)


def _exif(text: str, software: str) -> bytes:
    """Exif data, little endian: who made the file, and the text as the user's comment."""
    own = [
        (_EXIF_VERSION, _UNDEFINED, b"0232"),
        (_USER_COMMENT, _UNDEFINED, _ASCII_TEXT + text.encode("ascii")),
    ]
    first = [(_SOFTWARE, _ASCII, software.encode("ascii") + b"\0"), (_EXIF_IFD, _LONG, b"")]
    begins = 8
    own_begins = begins + len(_directory(first, begins))
    first[1] = (_EXIF_IFD, _LONG, struct.pack("<I", own_begins))
    return b"II*\0\x08\0\0\0" + _directory(first, begins) + _directory(own, own_begins)


def _directory(entries: list[tuple[int, int, bytes]], begins: int) -> bytes:
    """An image file directory at offset `begins`, and behind it the values over four bytes."""
    table, values = [struct.pack("<H", len(entries))], b""
    values_begin = begins + 2 + 12 * len(entries) + 4
    for tag, kind, data in entries:
        count = 1 if kind == _LONG else len(data)
        value = data.ljust(4, b"\0")
        if len(data) > 4:
            value = struct.pack("<I", values_begin + len(values))
            values += data + b"\0" * (len(data) % 2)
        table.append(struct.pack("<HHI", tag, kind, count) + value)
    return b"".join((*table, b"\0\0\0\0", values))
