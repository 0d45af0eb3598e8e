"""What an image file says of itself: a JSON document of how it was made, and an XMP packet.

All of it is a function of the job, its settings and the image's row. No clock, worker, attempt or
path has a part in it, so that equal images still give equal files. `docs/provenance.md` describes
the keys; `recorded_making` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any
from xml.sax.saxutils import escape

from jobs.config import EmbedMetadata, JobConfig
from jobs.executor import Settings
from jobs.metadata_chunks import add_metadata
from jobs.plan import Sample

SCHEMA_VERSION = 1
PROGRAM = "zimage-batch"
MAX_PROMPT = 16_384
"""Characters of a prompt as JSON writes them in ASCII. What is longer is cut, see `cut`."""
MAX_NAME = 1024
MAX_LORAS = 64
MAX_PICTURES = 64

_XMP_PROMPT = 6_000  # characters; a JPEG segment has 65,533 bytes, and `&` takes five of them
_LIMITS = {"prompt": MAX_PROMPT, "negative_prompt": MAX_PROMPT, "model": MAX_NAME}
_LISTS = {"loras": MAX_LORAS, "images_sha256": MAX_PICTURES}
# The IPTC's words for images that a model drew, and for pictures that it changed.
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_DRAWN, _CHANGED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
{properties}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def with_metadata(
    content: bytes, level: EmbedMetadata, making: Mapping[str, object], *, from_picture: bool
) -> bytes:
    """An image file that says how it was made.

    Args:
        content: PNG, JPEG or WebP, without metadata.
        level: `output.embed_metadata`.
        making: keys of the document; None is left out. Only "full" looks at it.
        from_picture: whether a given picture was started from or edited.
    """
    if level == "none":
        return content
    source_type = _SOURCE_TYPES + (_CHANGED if from_picture else _DRAWN)
    software = f"{PROGRAM} {program_version()}"
    document: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "program": PROGRAM,
        "version": program_version(),
        "digital_source_type": source_type,
    }
    properties = {"xmp:CreatorTool": software, "Iptc4xmpExt:DigitalSourceType": source_type}
    if level == "full":
        document |= _bounded(making)
        properties["Iptc4xmpExt:AISystemUsed"] = str(document["model"])
        properties["Iptc4xmpExt:AIPromptInformation"] = str(document["prompt"])[:_XMP_PROMPT]
    return add_metadata(content, document=document, xmp=_xmp(properties), software=software)


def job_making(
    config: JobConfig,
    settings: Settings,
    sample: Sample,
    *,
    dtype: str | None,
    batch_size: int,
    batch_mode: str,
) -> dict[str, object]:
    """How a sample of a job was made, for `with_metadata`.

    Args:
        dtype: where another than the job's.
        batch_size: how many images were made together with it, itself included.
        batch_mode: as in its row.
    """
    sampling, init_image = config.sampling, sample.init_image
    return {
        "prompt": sample.prompt,
        "negative_prompt": sample.negative_prompt or None,
        "seed": sample.seed,
        "width": sample.width,
        "height": sample.height,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "cfg_normalization": sampling.cfg_normalization,
        "cfg_truncation": sampling.cfg_truncation,
        "max_sequence_length": sampling.max_sequence_length,
        "cache": sampling.cache,
        "strength": None if init_image is None else sampling.strength,
        "init_image_sha256": None if init_image is None else init_image.sha256,
        "images_sha256": [picture.sha256 for picture in sample.pictures] or None,
        "loras": [
            {
                "name": name,
                "scale": config.model.loras[name].scale,
                "fingerprint": settings.loras.get(name),
            }
            for name in sample.loras
        ]
        or None,
        "model": settings.model,
        "model_fingerprint": settings.model_fingerprint,
        "dtype": settings.dtype if dtype is None else dtype,
        "attention": settings.attention,
        "compile": settings.compile,
        "quantization": config.model.quantization,
        "device_type": settings.device_type,
        "threads": settings.threads_per_worker,
        "job": config.name,
        "index": sample.index,
        "batch_size": batch_size,
        "batch_mode": batch_mode,
    }


@cache
def program_version() -> str:
    """Of this project."""
    return version(PROGRAM)


def _bounded(making: Mapping[str, object]) -> dict[str, object]:
    """What of a document may grow without end, cut; the names of what was cut are under `cut`."""
    document: dict[str, Any] = {}
    cut = []
    for key, value in making.items():
        if value is None:
            continue
        if isinstance(value, str):
            value = value.encode(errors="replace").decode()  # no half of a surrogate pair
        if key in _LIMITS:
            document[key] = _shortened(str(value), _LIMITS[key])
        elif key in _LISTS and isinstance(value, list):
            document[key] = value[: _LISTS[key]]
        else:
            document[key] = value
        if document[key] != value:
            cut.append(key)
    return document | ({"cut": cut} if cut else {})


def _shortened(text: str, limit: int) -> str:
    """The longest beginning or nearly so that takes up to `limit` characters of JSON."""
    text = text[:limit]
    while (length := len(json.dumps(text)) - 2) > limit:
        text = text[: len(text) * limit // length]
    return text


def _xmp(properties: Mapping[str, str]) -> str:
    lines = (f"   <{name}>{_xml(value)}</{name}>" for name, value in properties.items())
    return _XMP.format(properties="\n".join(lines))


def _xml(text: str) -> str:
    """Text of an element; what XML 1.0 cannot say is a replacement character."""
    return escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})
