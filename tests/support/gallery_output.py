"""Outputs of thousands of small images, written through the layers of a run, without a model.

    python -m gallery_output FOLDER --count 5000

with `tests/support` on PYTHONPATH.
"""

import argparse
import colorsys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
from job_runs import ROOT

from jobs.commits import PartName, write_part
from jobs.config import JobConfig
from jobs.executor import Settings
from jobs.manifest import ManifestRow
from jobs.plan import new_plan
from jobs.record import PATH, PromptSource, new_record
from jobs.storage import Storage
from jobs.writers import Pixels, PNGWriter, pixels_sha256, sha256

SHARD = 100
HAIR = ("black", "brown", "blond", "red", "grey", "white", "green", "blue")
PLACES = ("harbour", "library", "kitchen", "forest", "station", "workshop", "garden")
BEGUN = datetime(2026, 11, 30, 9, 0, tzinfo=UTC)


def make_output(uri: str, count: int, *, made: int | None = None, **changes: object) -> Storage:
    """An output of `count` samples, of which the first `made` have a row; every 97th failed.

    Args:
        changes: of `row`: `prompts`, `metadata`, `distinct`.
    """
    storage = Storage(uri, create=True)
    plan = new_plan(0, count, SHARD)
    config = JobConfig.model_validate(
        {
            "name": "faces",
            "model": {"path": str(ROOT / "data/checkpoints/z-image-tiny"), "dtype": "float32"},
            "prompts": {"generator": "avatars", "count": count},
            "sampling": {"width": 64, "height": 64},
            "output": {"uri": uri, "shard_size": SHARD},
        }
    )
    settings = Settings("cpu", "float32", "native", False, "none", 4, 1, "tiny", "sha256:0")
    source = PromptSource("avatars", "{}", "0" * 64, None)
    command = ("zimage", "run", "jobs/faces.yaml", "--output", uri)
    storage.put(PATH, new_record(config, settings, source, plan, command).dump())
    for shard in range(plan.num_shards):
        if plan.shard(shard).start < (count if made is None else made):
            commit(storage, plan.shard(shard).start, plan.shard(shard).stop, **changes)
    return storage


def commit(storage: Storage, start: int, stop: int, *, revision: int = 0, **changes) -> None:
    """One shard's part, and its images."""
    rows = [row(storage, index, revision=revision, **changes) for index in range(start, stop)]
    failed = sum(r.status == "failed" for r in rows)
    before = failed if revision else 0
    name = PartName(start // SHARD, revision, 0, 0, 1, len(rows), failed, before, revision + 1)
    write_part(storage, name, rows)


def row(
    storage: Storage,
    index: int,
    *,
    revision: int = 0,
    prompts: Mapping[int, str] | None = None,
    metadata: Mapping[int, Mapping[str, object]] | None = None,
    distinct: int = 64,
) -> ManifestRow:
    failed = index % 97 == 96
    kind = index % distinct + 1000 * revision
    content, pixels = png(kind)
    attempt = f"{index // SHARD:08d}-r{revision}aaaaaa"
    name = f"images/{attempt}/faces_{index:08d}.png"
    if not failed:
        storage.put(name, content)
    hair, place = HAIR[index % len(HAIR)], PLACES[index % len(PLACES)]
    age = 18 + index * 7 % 60
    profile = {"id": f"p{index:05d}", "age": age, "hair": hair, "place": place}
    return ManifestRow(
        file_name=None if failed else name,
        index=index,
        prompt_index=index,
        status="failed" if failed else "ok",
        prompt=(prompts or {}).get(
            index, f"portrait of a {age} year old person with {hair} hair in a {place}, soft light"
        ),
        negative_prompt="blurred" if index % 2 else None,
        seed=42 + index,
        width=64,
        height=64,
        num_inference_steps=8,
        guidance_scale=0.0,
        model="z-image-tiny",
        model_fingerprint="sha256:0",
        loras=None,
        dtype="float32",
        attention="native",
        format="png",
        bytes=None if failed else len(content),
        sha256=None if failed else sha256(content),
        pixels_sha256=None if failed else pixels,
        shard=index // SHARD,
        revision=revision,
        attempt=attempt,
        batch=(index,),
        batch_mode="planned",
        worker=f"w{index % 2}",
        node="node-1",
        device="cpu",
        seconds=None if failed else 0.5 + index % 10 / 10,
        error_type="invalid_image" if failed else None,
        error_message="the image is of one flat colour, rgb(0, 0, 0)" if failed else None,
        created_at=BEGUN + timedelta(seconds=index),
        metadata=profile | dict((metadata or {}).get(index, {})),
    )


@cache
def png(kind: int) -> tuple[bytes, str]:
    """A small picture, its file and the hash of its pixels."""
    pixels = picture(kind)
    return PNGWriter().encode(pixels), pixels_sha256(pixels)


def picture(kind: int, side: int = 64) -> Pixels:
    """A disc before a gradient, (side, side, 3), another one for each `kind`."""
    y, x = np.mgrid[0:side, 0:side] / side
    hue = kind * 0.61803 % 1
    ground = np.array(colorsys.hsv_to_rgb(hue, 0.35, 0.95)) * (1 - 0.4 * y[..., None])
    disc = np.array(colorsys.hsv_to_rgb((hue + 0.45) % 1, 0.6, 0.75))
    radius = 0.18 + 0.02 * (kind % 7)
    inside = (x - 0.5) ** 2 + (y - 0.45) ** 2 < radius**2
    return (np.where(inside[..., None], disc, ground) * 255).astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--distinct", type=int, default=64)
    arguments = parser.parse_args()
    make_output(arguments.folder, arguments.count, distinct=arguments.distinct)
