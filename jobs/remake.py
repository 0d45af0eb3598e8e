"""`zimage generate --from`: an image made again from what it says of itself, and compared."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.config import JobConfig
from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, InputError
from jobs.fingerprint import adapter_fingerprint
from jobs.image_metadata import PROGRAM, program_version
from jobs.pixel_difference import pixel_difference
from jobs.quantities import counted
from jobs.record import PATH as RECORD
from jobs.record import read_record
from jobs.recorded_making import RecordedMaking, read_source
from jobs.storage import Storage
from jobs.terminal import visible
from jobs.writers import WRITERS, ImageFormat, Pixels, decode_image

# Keys of an image's metadata, and the flags that say the same.
_FLAGS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cache": "cache",
    "dtype": "dtype",
    "attention": "attention",
    "quantization": "quantization",
    "cfg_normalization": "cfg_normalization",
    "cfg_truncation": "cfg_truncation",
    "max_sequence_length": "max_sequence_length",
}
_FILES = {
    "init_image_sha256": ("init_image", "started from a picture"),
    "mask_sha256": ("mask", "made anew where a mask is white"),
    "images_sha256": ("image", "made by editing pictures"),
}
_MAX_THREADS = 256
_OUTPUT_DEPTH = 3  # folders above an image in images/ATTEMPT/ of an output


class Remake:
    """Sets the flags that are not given to what `args.source` says, and compares what comes of it.

    Raises:
        InputError: the file says nothing, or what cannot be, or a file that it was made from is
            not given.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._source = read_source(args.source, "--from")
        self._making: RecordedMaking = self._source.making
        if args.model is None:
            self._take_model()
        self._given: list[str] = []  # flags that ask for another image
        self.changes: list[str] = []  # what is not as it was
        if args.output is not None and args.output.exists() and args.output.samefile(args.source):
            raise InputError(f"--output: {args.output}: is the image of --from; allowed: another")
        self._fills_attention = args.attention is None
        self._fill_values()
        self._check_files()
        self._fill_loras()

    def settle(self, device_type: str) -> None:
        """Set what depends on the device; a job's threads, whose number changes float32 sums."""
        import torch

        making = self._making
        if device_type != making.device_type:
            self.changes.append(f"device: was {making.device_type}, now {device_type}")
            if self._fills_attention:
                self._args.attention = "auto"  # what ran there may not be here
        if device_type == "cpu":
            torch.set_num_threads(min(making.threads, _MAX_THREADS, 2 * (os.cpu_count() or 1)))

    def check_weights(self, fingerprint: str) -> None:
        """Warn where the weights are others."""
        before = self._making.model_fingerprint
        if fingerprint != before:
            self._warn(
                f"model weights: were {before} ({self._making.model}), now {fingerprint} "
                f"({self._args.model})"
            )

    def check_hashes(self, found: dict[str, str | list[str]]) -> None:
        """Warn where files that it is made from are others. `found` is by key of the metadata."""
        for key, (flag, _) in _FILES.items():
            before, now = getattr(self._making, key), found.get(key)
            if before and now and before != now:
                self._warn(f"--{flag.replace('_', '-')}: sha256 was {before}, now {now}")

    def compare(
        self,
        made: Pixels,
        facts: dict[str, object],
        encode: Callable[[Pixels, ImageFormat], bytes],
    ) -> int:
        """Say how the image compares with that of `--from`; the exit code.

        Args:
            made: uint8 (H, W, 3).
            facts: how it was made, as its metadata would say.
            encode: makes a file like that of `--from` where no job made that.
        """
        stored, form = self._source.pixels, self._source.form
        if form != "png" and made.shape == stored.shape:
            of_job = self._making.job is not None
            made = decode_image(WRITERS[form].encode(made) if of_job else encode(made, form))
        if made.shape != stored.shape:
            words = f"different: {made.shape[1]}x{made.shape[0]} pixels"
        else:
            difference = pixel_difference(stored, made)
            if not difference.max_difference:
                print(visible(f"{self._source.path}: made again with equal pixels"))
                return EXIT_OK
            words = f"different: {difference.words()}"
        lines = [f"{self._source.path}: {words}"]
        if self._given:
            lines.append(f"other than it was made: {', '.join(self._given)}")
        changes = [*self.changes, *self._later_changes(facts)]
        if changes:
            lines += ["what is not as it was:", *(f"  {change}" for change in changes)]
        elif not self._given:
            lines.append(
                "nothing that the file says has changed; it does not say the versions of torch and "
                "other libraries, the kind of CPU or GPU, nor that its pixels were not changed"
            )
        print(visible("\n".join(lines)))
        return EXIT_OK if self._given else EXIT_DIFFERENCE

    def _take_model(self) -> None:
        """Take the checkpoint of the output that the image lies in: an image names no path."""
        args = self._args
        for folder in args.source.absolute().parents[:_OUTPUT_DEPTH]:
            if not (folder / RECORD).is_file():
                continue
            record = read_record(Storage(str(folder)))
            assert record is not None
            model = JobConfig.model_validate(record.config).model
            args.model = model.folder
            for name, path in model.parts.items():
                if getattr(args, name) is None:
                    setattr(args, name, path)
            words = f"--model {args.model}, as {folder / RECORD} says"
            print(visible(f"zimage generate: {words}"), file=sys.stderr)
            return
        raise InputError(
            f"--model: not given, and {args.source} is in no output, whose {RECORD} would say; "
            f"allowed: the folder of its checkpoint, {self._making.model!r}"
        )

    def _fill_values(self) -> None:
        args, making = self._args, self._making
        for key, name in _FLAGS.items():
            recorded, given = getattr(making, key), getattr(args, name)
            if given is None:
                if key in making.cut:
                    raise InputError(
                        f"--from: {args.source}: its {key} was too long to be written whole; give "
                        f"it with --{name.replace('_', '-')}"
                    )
                setattr(args, name, recorded)
            elif given != recorded:
                self._given.append(f"--{name.replace('_', '-')}")
        if making.init_image_sha256 is not None and args.strength is None:
            args.strength = making.strength
        elif args.strength is not None and args.strength != making.strength:
            self._given.append("--strength")

    def _check_files(self) -> None:
        for key, (name, words) in _FILES.items():
            recorded, given = getattr(self._making, key), getattr(self._args, name)
            flag = f"--{name.replace('_', '-')}"
            if recorded and not given:
                hashes = [recorded] if isinstance(recorded, str) else recorded
                raise InputError(
                    f"{flag}: not given; {self._args.source} was {words}, sha256 "
                    f"{', '.join(hashes)}"
                )
            if given and not recorded:
                self._given.append(flag)

    def _fill_loras(self) -> None:
        args, recorded = self._args, self._making.loras
        files: list[Path] = args.lora or []
        if "loras" in self._making.cut:
            raise InputError(f"--from: {args.source}: it has too many adapters to be made again")
        if len(files) != len(recorded):
            if not files:
                names = ", ".join(f"{o.name} ({o.fingerprint}) at {o.scale:g}" for o in recorded)
                raise InputError(f"--lora: not given; {args.source} was made with {names}")
            self._given.append("--lora")
            return
        if not files:
            return
        found = _fingerprints(files)
        before = [lora.fingerprint for lora in recorded]
        if set(found) == set(before) and len(set(before)) == len(before):
            files[:] = [files[found.index(fingerprint)] for fingerprint in before]
            found = before
        for lora, file, now in zip(recorded, files, found, strict=True):
            if now is not None and now != lora.fingerprint:
                self._warn(f"adapter {lora.name}: was {lora.fingerprint}, now {now} ({file})")
        scales = [lora.scale for lora in recorded]
        if args.lora_scale is None:
            args.lora_scale = scales
        elif args.lora_scale not in (scales, scales[:1] if len(set(scales)) == 1 else scales):
            self._given.append("--lora-scale")

    def _later_changes(self, facts: dict[str, object]) -> list[str]:
        making = self._making
        changes = []
        if (making.program, making.version) != (PROGRAM, program_version()):
            before = f"{making.program} {making.version}"
            changes.append(f"program: was {before}, now {PROGRAM} {program_version()}")
        for key in ("dtype", "attention", "compile", "threads"):
            before, now = getattr(making, key), facts[key]
            if before != now:
                changes.append(f"{key}: was {before}, now {now}")
        if making.batch_size > 1:
            others = counted(making.batch_size - 1, "other")
            changes.append(
                f"batch: it was made together with {others}, now alone, which can change last bits"
            )
        return changes

    def _warn(self, words: str) -> None:
        self.changes.append(words)
        print(visible(f"warning: {words}"), file=sys.stderr)


def _fingerprints(files: Sequence[Path]) -> list[str | None]:
    """Of adapters; None for one that cannot be read, which is said when it is loaded."""
    found: list[str | None] = []
    for file in files:
        try:
            found.append(adapter_fingerprint(file))
        except (OSError, ValueError):
            found.append(None)
    return found
