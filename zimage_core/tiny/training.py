"""The stages of the tiny checkpoint's training, from captions to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.text_encoder import TextEncoder, full_model_shapes, load_tokenizer, tokenize
from zimage_core.tiny.attributes import draw_subject
from zimage_core.tiny.caption_batches import CaptionBatches
from zimage_core.tiny.caption_reading import CaptionReader
from zimage_core.tiny.captions import CaptionWriter
from zimage_core.tiny.dit_training import SHIFT, DitTrainer, Guide, initialize_transformer
from zimage_core.tiny.latents import encode_latents, scale_and_shift, subjects_of
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.sampling import (
    Validation,
    save_reconstructions,
    save_samples,
    sheet_prompts,
)
from zimage_core.tiny.settings import Settings, versions
from zimage_core.tiny.state import Budget, Log, Stage, record_settings
from zimage_core.tiny.text_training import TextTrainer, initialize_text_encoder
from zimage_core.tiny.tokenizer import HYPHENATED_WORD, save_tokenizer, train_tokenizer
from zimage_core.tiny.vae_training import (
    DecoderTrainer,
    VaeTrainer,
    draw_kind,
    draw_picture,
    initialize_vae,
    reconstruct,
)
from zimage_core.tiny.vocabulary import load_vocabulary
from zimage_core.tiny.writer import Checkpoint, read_vae, write_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel

STAGES = ("tokenizer", "vae", "latents", "text", "dit", "distill", "decoder")
_TEXT_BATCH = 96
_HELD_OUT = 32


ModelStates = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Of the transformer and of the text encoder."""


class Trainer(Protocol):
    """What a stage saves."""

    def parts(self) -> dict[str, Any]:
        """Named parts with `state_dict` and `load_state_dict`."""


class Training:
    """All stages, in order; each method does what is left of its stage.

    Args:
        state: folder for the state of all stages, the log and the sheets.
        settings: must be those that the folder was begun with.
        budgets: for "vae", "text", "dit", "distill" and "decoder".
        vocabularies: folder with the vocabularies; that of the clone if not given.
        vae: folder of a trained autoencoder (`config.json` and weights) that is taken as it is,
            instead of training one.
        quiet: nothing goes to the terminal.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(
        self,
        state: Path,
        settings: Settings,
        budgets: dict[str, Budget],
        *,
        vocabularies: Path | None = None,
        vae: Path | None = None,
        quiet: bool = False,
    ) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self.budgets = state, settings, budgets
        record_settings(state, asdict(settings))
        self.log = Log(state / "log.jsonl", quiet=quiet)
        self.log.write("start", versions=versions(), settings=asdict(settings))
        self.threads = Threads(settings.threads)
        self.vocabulary = load_vocabulary(vocabularies)
        sizes = settings.sizes()
        self.transformer_config, self.text_config = sizes.transformer(), sizes.text_encoder()
        self._given_vae = vae
        self.vae = AutoencoderKL(sizes.autoencoder())
        self.transformer = ZImageTransformer2DModel(self.transformer_config)
        self.text_encoder = TextEncoder(self.text_config)
        initialize_vae(self.vae, self._generator("vae weights"))
        initialize_transformer(self.transformer, self._generator("transformer weights"))
        initialize_text_encoder(self.text_encoder, self._generator("text weights"))
        self._stages: Mapping[str, Callable[[], None]] = {
            "tokenizer": self.tokenizer,
            "vae": self.autoencoder,
            "latents": self.latents,
            "text": self.text,
            "dit": self.dit,
            "distill": self.distill,
            "decoder": self.decoder,
        }

    def run(self, out: Path, until: str = STAGES[-1]) -> None:
        """Do all stages up to `until`; after the last, write `out` and `out` with "-base"."""
        for name in STAGES[: STAGES.index(until) + 1]:
            self._stages[name]()
        if until == STAGES[-1]:
            self.export(out)

    def tokenizer(self) -> None:
        """Train the tokenizer on captions."""
        folder = self.folder / "tokenizer"
        random = self._random("captions")
        writer = CaptionWriter(self.vocabulary, random)
        texts = [
            f"user\n{writer.caption(draw_subject(draw_kind(random), random))}\nassistant\n"
            for _ in range(self.settings.captions)
        ]
        self.bpe = train_tokenizer(self.settings.vocab_size, texts, word=HYPHENATED_WORD)
        save_tokenizer(folder, self.bpe)
        self.words = load_tokenizer(folder)
        self.log.write("tokenizer", tokens=self.bpe.get_vocab_size())

    def autoencoder(self) -> None:
        """Train the autoencoder, whose averaged weights stay, or take the given one."""
        if self._given_vae is not None:
            self.vae = read_vae(self._given_vae)
            self.vae.requires_grad_(False)
            self.log.write("vae", taken_from=str(self._given_vae))
            return
        random, generator = self._random("vae"), self._generator("vae")
        trainer = VaeTrainer(self.vae, self.threads, random, generator)

        def report(step: int) -> None:
            self._report_vae("vae", step, trainer.average.values)

        self._stage("vae", trainer, random, generator).run(trainer.step, report=report)
        self.vae.load_state_dict(trainer.average.values)
        self.vae.requires_grad_(False)

    def latents(self) -> None:
        """Encode the drawings that the transformer learns from."""
        seed, count = self.settings.latents_seed, self.settings.latents

        def report(done: int) -> None:
            self.log.write("latents", done=done, of=count)

        self.encoded = encode_latents(
            self.vae, self.folder / "latents", seed, count, self.threads, report
        )
        self.subjects = subjects_of(seed, count)
        scale, shift = scale_and_shift(self.encoded)
        self.vae.config = replace(self.vae.config, scaling_factor=scale, shift_factor=shift)
        self.log.write("latents", scale=scale, shift=shift)

    def text(self) -> None:
        """Teach the text encoder what captions state."""
        random, generator = self._random("text"), self._generator("text")
        batches = self._batches(random, _TEXT_BATCH, 0.0)
        torch.manual_seed(self.settings.seed)  # of the classifier, which is thrown away
        trainer = TextTrainer(
            self.text_encoder, batches, CaptionReader(self.vocabulary), self.threads
        )
        self._stage("text", trainer, random, generator).run(trainer.step)

    def dit(self) -> None:
        """Train the transformer and the text encoder together."""
        random, generator = self._random("dit"), self._generator("dit")
        trainer = self._dit_trainer(random, generator, lr=2e-3, guide=None)
        stage = self._stage("dit", trainer, random, generator)
        stage.run(trainer.step, report=self._reporter("dit", trainer, (0.0, 3.0)))
        averaged = trainer.averaged()
        self._load(averaged)
        self.base: ModelStates = (
            {name: value.clone() for name, value in averaged[0].items()},
            {name: value.clone() for name, value in averaged[1].items()},
        )

    def distill(self) -> None:
        """Teach the models to answer without guidance as they do with it."""
        random, generator = self._random("distill"), self._generator("distill")
        (ids,) = tokenize(self.words, [""], 512)
        empty = torch.zeros(1, 32, dtype=torch.int64)
        empty[0, : len(ids)] = torch.tensor(ids)
        guide = Guide(
            self.transformer,
            self.text_encoder,
            empty,
            len(ids),
            self.settings.guidance,
        )
        trainer = self._dit_trainer(random, generator, lr=1e-3, guide=guide)
        stage = self._stage("distill", trainer, random, generator)
        stage.run(trainer.step, report=self._reporter("distill", trainer, (0.0,)))
        self._load(trainer.averaged())

    def decoder(self) -> None:
        """Sharpen the decoder; latents and all that was learned about them stay as they are."""
        random, generator = self._random("decoder"), self._generator("decoder")
        self.vae.decoder.requires_grad_(True)
        trainer = DecoderTrainer(self.vae, self.threads, random, generator)

        def report(step: int) -> None:
            averaged = {f"decoder.{name}": x for name, x in trainer.average.values.items()}
            self._report_vae("decoder", step, {**self.vae.state_dict(), **averaged})

        self._stage("decoder", trainer, random, generator).run(trainer.step, report=report)
        self.vae.decoder.load_state_dict(trainer.average.values)
        self._sheet("final", self.vae, (self.transformer, self.text_encoder), 0.0)

    def export(self, out: Path) -> list[Path]:
        """Write the distilled checkpoint to `out` and the base to its neighbour `<out>-base`."""
        distilled = self.transformer.state_dict(), self.text_encoder.state_dict()
        folders = []
        for folder, (transformer, text) in (
            (out, distilled),
            (out.with_name(f"{out.name}-base"), self.base),
        ):
            # The last layer and the final norm are never run: zeros, which pack well.
            unused = {
                key: torch.zeros(shape)
                for key, shape in full_model_shapes(self.text_config).items()
                if key not in text
            }
            checkpoint = Checkpoint(
                self.transformer_config,
                self.vae.config,
                self.text_config,
                self.bpe,
                {
                    "transformer": transformer,
                    "vae": self.vae.state_dict(),
                    "text_encoder": {**text, **unused},
                },
            )
            write_checkpoint(folder, checkpoint, dtype=torch.float16, shift=SHIFT)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self.log.write("export", folder=str(folder), megabytes=round(size / 1e6, 2))
            folders.append(folder)
        return folders

    def _dit_trainer(
        self, random: Random, generator: torch.Generator, *, lr: float, guide: Guide | None
    ) -> DitTrainer:
        dropout = self.settings.dropout if guide is None else 0.03
        return DitTrainer(
            self.transformer,
            self.text_encoder,
            self.encoded,
            self.vae.config.scaling_factor,
            self.vae.config.shift_factor,
            self._batches(random, self.settings.batch_size, dropout),
            self.threads,
            generator,
            lr=lr,
            guide=guide,
        )

    def _batches(self, random: Random, batch_size: int, dropout: float) -> CaptionBatches:
        writer = CaptionWriter(self.vocabulary, random)
        return CaptionBatches(
            writer, self.words, self.subjects, batch_size, random, dropout=dropout
        )

    def _stage(
        self, name: str, trainer: Trainer, random: Random, generator: torch.Generator
    ) -> Stage:
        path = self.folder / f"{name}.pt"
        return Stage(path, name, self.budgets[name], self.log, trainer.parts(), random, generator)

    def _load(self, states: ModelStates) -> None:
        self.transformer.load_state_dict(states[0])
        self.text_encoder.load_state_dict(states[1])

    def _report_vae(self, name: str, step: int, state: Mapping[str, Tensor]) -> None:
        vae = AutoencoderKL(self.vae.config)
        vae.load_state_dict(dict(state))
        random = self._random("held out")
        pictures = np.stack([draw_picture(random) for _ in range(_HELD_OUT)])
        decoded, psnr = reconstruct(vae, pictures)
        self.log.write(name, step=step, psnr=round(psnr, 2))
        save_reconstructions(self.folder / "sheets" / f"{name}-{step:06d}.png", decoded)

    def _reporter(
        self, name: str, trainer: DitTrainer, guidance_scales: Sequence[float]
    ) -> Callable[[int], None]:
        config = self.vae.config
        validation = Validation(
            self.vae,
            config.scaling_factor,
            config.shift_factor,
            self.words,
            self.vocabulary,
            self._seed("validation"),
        )

        def report(step: int) -> None:
            transformer = ZImageTransformer2DModel(self.transformer_config)
            text_encoder = TextEncoder(self.text_config)
            averaged = trainer.averaged()
            transformer.load_state_dict(averaged[0])
            text_encoder.load_state_dict(averaged[1])
            losses = validation.losses(transformer, text_encoder)
            self.log.write(name, step=step, **losses)
            for scale in guidance_scales:
                sheet = f"{name}-{step:06d}-guidance-{scale:g}"
                self._sheet(sheet, self.vae, (transformer, text_encoder), scale)

        return report

    def _sheet(
        self,
        name: str,
        vae: AutoencoderKL,
        models: tuple[ZImageTransformer2DModel, TextEncoder],
        guidance_scale: float,
    ) -> None:
        transformer, text_encoder = models
        save_samples(
            self.folder / "sheets" / f"{name}.png",
            transformer,
            vae,
            text_encoder,
            self.words,
            sheet_prompts(self.vocabulary, self._seed("sheet")),
            guidance_scale=guidance_scale,
        )

    def _seed(self, purpose: str) -> str:
        return f"{self.settings.seed}/{purpose}"

    def _random(self, purpose: str) -> Random:
        return Random(self._seed(purpose))

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._random(purpose).getrandbits(62))
