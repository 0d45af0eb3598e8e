"""Python imports this at its start where the folder is on the path: failures of single samples.

The file that FAILURES names says which, in JSON: `max_batch` (more are out of memory), and lists of
sample indices under `kill`, `hang`, `nan`, `flat` and `raise`. Each worker reads it anew.
It needs `tests/support` on the path too.
"""

import json
import os
import signal
import time
from pathlib import Path


def _install(module) -> None:  # type: ignore[no-untyped-def]
    import torch

    failures = json.loads(Path(os.environ["FAILURES"]).read_text())
    stages, pipeline = module.BatchStages, module.ZImagePipeline
    denoise, decode_draft, decode = stages._denoise, stages._decode, pipeline.decode
    decoded: list[int] = []  # samples of the batch that is being decoded

    def at(kind: str, indices: list[int]) -> bool:
        return any(index in failures.get(kind, ()) for index in indices)

    def _denoise(self, draft):  # type: ignore[no-untyped-def]
        indices = [sample.index for sample in draft.samples]
        if len(indices) > failures.get("max_batch", 1000):
            raise torch.OutOfMemoryError(f"no memory for {len(indices)} images")
        if at("kill", indices):
            os.kill(os.getpid(), signal.SIGKILL)
        while at("hang", indices):
            time.sleep(1)
        if at("raise", indices):
            raise RuntimeError("this batch cannot be made")
        denoise(self, draft)

    def _decode(self, draft):  # type: ignore[no-untyped-def]
        decoded[:] = [sample.index for sample in draft.samples]
        try:
            return decode_draft(self, draft)
        finally:
            decoded.clear()

    def damaged(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        images = decode(self, *args, **kwargs)
        for image, index in zip(images, decoded, strict=False):  # none of them: the canary
            if at("nan", [index]):
                image[0, 0, 0] = float("nan")
            if at("flat", [index]):
                image[:] = 0.5
        return images

    stages._denoise, stages._decode, pipeline.decode = _denoise, _decode, damaged


if os.environ.get("FAILURES"):
    from import_hook import after_import

    after_import("jobs.batch_stages", _install)
