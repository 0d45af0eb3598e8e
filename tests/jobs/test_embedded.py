"""What image files say of how they were made: written beside the pixels, the same in every run."""

import io
import json
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from cli_calls import CommandLine
from PIL import Image

from jobs.config import JobConfig
from jobs.executor import Settings
from jobs.image_metadata import job_making, with_metadata
from jobs.input_images import InputImage
from jobs.metadata_chunks import read_text
from jobs.plan import Sample
from jobs.writers import WRITERS, ImageFormat, Pixels, PNGWriter, decode_image

PROMPT = 'a "red" äpple <&> ]]> 木 😀\r\n\x01\0 end'
FORMATS: list[ImageFormat] = ["png", "jpeg", "webp"]
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CHANGED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
CONFIG = JobConfig.model_validate(
    {
        "name": "faces",
        "model": {
            "path": "/secret/folder",
            "loras": {"ink": {"path": "/secret/ink", "scale": 0.5}},
        },
        "prompts": {"generator": "avatars"},
        "output": {"uri": "out"},
    }
)
SETTINGS = Settings(
    *("cpu", "float32", "native", False, "none", 8, 1, "z-image", f"sha256:{'0' * 64}"),
    loras={"ink": f"sha256:{'1' * 64}"},
)


def pixels(height: int = 17, width: int = 30) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def making(prompt: str = PROMPT, **changes: Any) -> dict[str, object]:
    sample = Sample(3, 3, prompt, "blur", 45, 32, 16, loras=("ink",), **changes)
    return job_making(CONFIG, SETTINGS, sample, dtype=None, batch_size=2, batch_mode="planned")


def document(content: bytes) -> dict[str, Any]:
    found = json.loads(read_text(content) or "null")
    assert isinstance(found, dict)
    return found


def packet(content: bytes) -> Mapping[str, str | None]:
    """Properties of the XMP packet, as an XML parser reads them."""
    with Image.open(io.BytesIO(content)) as image:
        found = image.info.get("XML:com.adobe.xmp") or image.info["xmp"]
    text = found if isinstance(found, str) else found.decode()
    assert text.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    description = ElementTree.fromstring(text).find(f".//{RDF}Description")
    assert description is not None
    return {element.tag: element.text for element in description}


def without_metadata(content: bytes) -> bytes:
    """Read by hand, chunk by chunk; what remains is the file as it was encoded."""
    if content.startswith(b"\x89PNG"):
        kept, at = [content[:8]], 8
        while at < len(content):
            (length,) = struct.unpack(">I", content[at : at + 4])
            end = at + 12 + length
            kept += [content[at:end]] * (content[at + 4 : at + 8] != b"iTXt")
            at = end
        return b"".join(kept)
    if content.startswith(b"\xff\xd8"):
        kept, at = [content[:2]], 2
        while content[at : at + 2] != b"\xff\xda":
            (length,) = struct.unpack(">H", content[at + 2 : at + 4])
            end = at + 2 + length
            kept += [content[at:end]] * (content[at : at + 2] != b"\xff\xe1")
            at = end
        return b"".join([*kept, content[at:]])
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8
    assert content[12:16] == b"VP8X" and content[30:34] == b"VP8 "
    (length,) = struct.unpack("<I", content[34:38])
    data = content[30 : 38 + length + length % 2]
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_says_how_it_was_made_and_its_pixels_are_untouched(form: ImageFormat) -> None:
    plain = WRITERS[form].encode(pixels())
    content = with_metadata(plain, "full", making(), from_picture=False)
    assert without_metadata(content) == plain
    assert np.array_equal(decode_image(content), decode_image(plain))
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # checksums
    assert document(content) == {
        "schema_version": 1,
        "program": "zimage-batch",
        "version": "0.1.0",
        "digital_source_type": DRAWN,
        "prompt": PROMPT,
        "negative_prompt": "blur",
        "seed": 45,
        "width": 32,
        "height": 16,
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "cfg_normalization": False,
        "cfg_truncation": 1.0,
        "max_sequence_length": 512,
        "loras": [{"name": "ink", "scale": 0.5, "fingerprint": f"sha256:{'1' * 64}"}],
        "model": "z-image",
        "model_fingerprint": f"sha256:{'0' * 64}",
        "dtype": "float32",
        "attention": "native",
        "compile": False,
        "quantization": "none",
        "device_type": "cpu",
        "threads": 1,
        "job": "faces",
        "index": 3,
        "batch_size": 2,
        "batch_mode": "planned",
    }
    assert b"secret" not in content
    assert packet(content) == {
        TOOL: "zimage-batch 0.1.0",
        f"{IPTC}DigitalSourceType": DRAWN,
        f"{IPTC}AISystemUsed": "z-image",
        # XML 1.0 has no such control characters
        f"{IPTC}AIPromptInformation": PROMPT.replace("\x01\0", "\ufffd\ufffd"),
    }
    assert with_metadata(plain, "full", making(), from_picture=False) == content


@pytest.mark.parametrize("form", FORMATS)
def test_minimal_tells_nothing_but_who_made_it_and_none_nothing(form: ImageFormat) -> None:
    plain = WRITERS[form].encode(pixels())
    assert with_metadata(plain, "none", making(), from_picture=False) is plain
    content = with_metadata(plain, "minimal", making("Jane Doe"), from_picture=True)
    assert without_metadata(content) == plain
    about = {"schema_version": 1, "program": "zimage-batch", "version": "0.1.0"}
    assert document(content) == {**about, "digital_source_type": CHANGED}
    assert packet(content) == {
        TOOL: "zimage-batch 0.1.0",
        f"{IPTC}DigitalSourceType": CHANGED,
    }
    assert with_metadata(plain, "minimal", making("Bob"), from_picture=True) == content


def test_images_are_named_by_their_content_alone() -> None:
    image = InputImage("people/jane.png", "ab" * 32, (32, 16))
    started = making(images=(image,))
    assert started["init_image_sha256"] == image.sha256 and started["strength"] == 0.6
    edited = making(images=(image, image), edits=True)
    assert edited["images_sha256"] == [image.sha256] * 2 and edited["strength"] is None
    assert "jane" not in json.dumps([started, edited])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("letter", ["a", "木", "😀", "&", '"', "\0", "\ud800"])
def test_a_prompt_without_end_is_cut(form: ImageFormat, letter: str) -> None:
    facts = making(letter * 1_000_000)
    facts |= {"negative_prompt": letter * 20_000, "loras": making()["loras"] * 500}
    facts["images_sha256"] = ["0" * 64] * 1000
    content = with_metadata(WRITERS[form].encode(pixels()), "full", facts, from_picture=False)
    found = document(content)
    assert found["cut"] == ["prompt", "negative_prompt", "images_sha256", "loras"]
    for key in ("prompt", "negative_prompt"):
        assert 1000 < len(json.dumps(found[key])) - 2 <= 16_384
        assert found[key] == str(facts[key]).encode(errors="replace").decode()[: len(found[key])]
    assert len(found["loras"]) == len(found["images_sha256"]) == 64
    shown = packet(content)[f"{IPTC}AIPromptInformation"]
    assert shown == found["prompt"][:6000].replace("\0", "\ufffd")
    assert with_metadata(PNGWriter(9).encode(pixels()), "full", facts, from_picture=False)


FACES = ("--set", "output.shard_size=2", "--count", 4)


def files(zimage: CommandLine, output: str) -> list[bytes]:
    rows = sorted(zimage.rows(output), key=lambda row: row["index"])
    return [(zimage.folder / output / row["file_name"]).read_bytes() for row in rows]


@pytest.mark.long
def test_files_of_a_job_are_the_same_in_every_run(zimage: CommandLine) -> None:
    zimage.run(*FACES, code=0)
    rows, made = zimage.rows(), files(zimage, "out")
    for row, content in zip(rows, made, strict=True):
        found = document(content)
        same = ("prompt", "seed", "width", "height", "model", "model_fingerprint", "dtype")
        same = (*same, "num_inference_steps", "guidance_scale", "attention", "batch_mode", "index")
        assert {key: found[key] for key in same} == {key: row[key] for key in same}
        assert (found["job"], found["batch_size"]) == ("t", len(row["batch"]))
        assert row["seed"] == 42 + row["index"] and len(content) == row["bytes"]

    # Made in two runs, as where the first died before it committed all.
    zimage.run(*FACES, "--output", "again", code=0)
    first = sorted((zimage.folder / "again/manifest").iterdir())[0]
    first.unlink()
    zimage.run(*FACES, "--output", "again", code=0)
    assert files(zimage, "again") == made
    assert [row["sha256"] for row in zimage.rows("again")] == [row["sha256"] for row in rows]

    # Without metadata: other bytes of the same pixels, those that the writer alone makes.
    zimage.run(*FACES, "--output", "bare", "--set", "output.embed_metadata=none", code=0)
    bare = zimage.rows("bare")
    assert [row["pixels_sha256"] for row in bare] == [row["pixels_sha256"] for row in rows]
    contents = files(zimage, "bare")
    assert contents == [WRITERS["png"].encode(decode_image(content)) for content in made]
    assert contents == [without_metadata(content) for content in made]

    # As one tar, and tidied up.
    zimage.run(*FACES, "--output", "tars", "--set", "output.layout=webdataset", code=0)
    packed: dict[str, bytes] = {}
    for path in (zimage.folder / "tars/images").glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                packed[name] = tar.extractfile(name).read()  # type: ignore[union-attr]
    assert [packed[f"t_{index:08d}.png"] for index in range(4)] == made
    zimage("export", "out", "tidy", code=0)
    assert [(zimage.folder / f"tidy/t_{i:08d}.png").read_bytes() for i in range(4)] == made
    for output in ("out", "tars", "bare"):
        zimage("verify", output, code=0)
    zimage("regen", "out", 1, code=0)

    # What files say belongs to what an output is made from; of old outputs that was nothing.
    ended = zimage.run(*FACES, "--set", "output.embed_metadata=minimal", code=2)
    assert "output.embed_metadata: was 'full', now 'minimal'" in ended.err
    record = zimage.folder / "bare/job.json"
    content = json.loads(record.read_text())
    del content["job"]["output"]["embed_metadata"]
    record.write_text(json.dumps(content))
    ended = zimage.run(*FACES, "--output", "bare", code=2)
    assert "output.embed_metadata: was 'none', now 'full'" in ended.err


def test_other_words_are_refused(zimage: CommandLine) -> None:
    error = zimage.run("--set", "output.embed_metadata=some", code=2).err
    assert "output.embed_metadata: value 'some'" in error
    assert all(word in error for word in ("full", "minimal", "none"))
    assert not Path(zimage.folder / "out").exists()
