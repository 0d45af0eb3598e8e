"""The training of the tiny edit checkpoint: its stages, what they leave, and the folder at the end.

It begins with a tiny text-to-image checkpoint. The autoencoder stays as it is, transformer and text
encoder go on learning, and what takes pictures is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from zimage_core.chat_template import VISION_END, VISION_START
from zimage_core.config import VisionConfig, VisionProcessorConfig
from zimage_core.contact_sheet import contact_sheet
from zimage_core.loader import load_from_local_dir
from zimage_core.text_encoder import TextEncoder, full_model_shapes, load_tokenizer
from zimage_core.tiny.dit_training import SHIFT, initialize_transformer
from zimage_core.tiny.edit_pairs import encode_pairs
from zimage_core.tiny.edit_score import (
    EditQuestion,
    edit_pictures,
    make_edit_questions,
    score_edits,
)
from zimage_core.tiny.edit_trainer import EditTrainer, Instructed
from zimage_core.tiny.instructions import InstructionWriter
from zimage_core.tiny.make import vision_configs
from zimage_core.tiny.parallel import Threads
from zimage_core.tiny.settings import versions
from zimage_core.tiny.state import Budget, Log, Stage, record_settings
from zimage_core.tiny.tokenizer import save_tokenizer
from zimage_core.tiny.vision_training import VisionTrainer
from zimage_core.tiny.vocabulary import load_vocabulary
from zimage_core.tiny.writer import Checkpoint, write_checkpoint
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.vision import VisionEncoder, VisionProcessor, pooling_head_shapes

STAGES = ("pairs", "vision", "edit")


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What a training depends on, but for how long its stages take."""

    seed: int = 0
    groups: int = 4000
    batch_size: int = 32
    vision_batch_size: int = 96
    dropout: float = 0.05
    lr: float = 1.5e-3
    vision_dim: int = 64
    vision_layers: int = 2
    threads: int = 2

    @property
    def pairs_seed(self) -> str:
        """Of the list of groups that the model learns from."""
        return f"{self.seed}/edit pairs"

    def vision(self) -> tuple[VisionConfig, VisionProcessorConfig]:
        """Configurations of the vision encoder and of its processor: 4 x 4 patches of 16 pixels."""
        return vision_configs(self.vision_dim, layers=self.vision_layers, max_patches=16)


class EditTraining:
    """All stages, in order; each does what is left of it.

    Args:
        base: folder of the text-to-image checkpoint to begin with.
        state: folder for the state of all stages, the log and the sheets.
        settings: must be those that the folder was begun with.
        budgets: for "vision" and "edit".
        vocabularies: folder with the vocabularies; that of the clone if not given.
        looked_at: edits that are made and scored, about ten times while the training runs.
        quiet: nothing goes to the terminal.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(
        self,
        base: Path,
        state: Path,
        settings: EditSettings,
        budgets: Mapping[str, Budget],
        *,
        vocabularies: Path | None = None,
        looked_at: int = 24,
        quiet: bool = False,
    ) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self.budgets = state, settings, budgets
        self.looked_at = looked_at
        record_settings(state, asdict(settings))
        self.log = Log(state / "log.jsonl", quiet=quiet)
        self.log.write("start", versions=versions(), settings=asdict(settings))
        self.threads = Threads(settings.threads)
        self.vocabulary = load_vocabulary(vocabularies)
        self.vision_config, self.processor_config = settings.vision()
        self.processor = VisionProcessor(self.processor_config)
        generator = self._generator("weights")
        self.vision = VisionEncoder(self.vision_config)
        initialize_vision(self.vision, generator)
        self._begin_with(base, generator)

    def run(self, out: Path) -> None:
        """Do all stages and write the checkpoint to `out`."""
        self.pairs()
        self.see()
        self.edit()
        self.export(out)

    def pairs(self) -> None:
        """Draw and encode what is learned from."""
        count = self.settings.groups

        def report(done: int) -> None:
            if done % 500 == 0:
                self.log.write("pairs", done=done, of=count)

        self.encoded = encode_pairs(
            self.vae,
            self.processor,
            self.folder / "pairs",
            self.settings.pairs_seed,
            count,
            self.threads,
            report,
        )
        self.log.write("pairs", groups=count)

    def see(self) -> None:
        """Teach the vision encoder what can be seen in drawings."""
        random, generator = self._random("vision"), self._generator("vision")
        torch.manual_seed(self.settings.seed)  # of the classifier, which is thrown away
        trainer = VisionTrainer(
            self.vision,
            self.encoded,
            self.processor,
            self.threads,
            random,
            batch_size=self.settings.vision_batch_size,
        )
        self._stage("vision", trainer.parts(), random, generator).run(trainer.step)

    def edit(self) -> None:
        """Train the three models together."""
        random, generator = self._random("edit"), self._generator("edit")
        instructed = Instructed(
            self.encoded,
            InstructionWriter(self.vocabulary, random),
            self.words,
            random,
            self.settings.dropout,
        )
        trainer = EditTrainer(
            self.transformer,
            self.text_encoder,
            self.vision,
            instructed,
            self.processor,
            self.vae.config.scaling_factor,
            self.vae.config.shift_factor,
            self.threads,
            generator,
            batch_size=self.settings.batch_size,
            lr=self.settings.lr,
        )
        seed = f"{self.settings.seed}/look"
        questions = make_edit_questions(self.vocabulary, self.looked_at, seed)

        def report(step: int) -> None:
            self._report(step, trainer.averaged(), questions)

        stage = self._stage("edit", trainer.parts(), random, generator)
        stage.run(trainer.step, report=report)
        for name, state in trainer.averaged().items():
            trainer.models[name].load_state_dict(state)

    def export(self, out: Path) -> Path:
        """Write the checkpoint."""
        self._write(out, {name: m.state_dict() for name, m in self._models().items()})
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        self.log.write("export", folder=str(out), megabytes=round(size / 1e6, 2))
        return out

    def _begin_with(self, base: Path, generator: torch.Generator) -> None:
        """Take over the models of a checkpoint, with room for what is new."""
        components = load_from_local_dir(base, device="cpu", dtype=torch.float32)
        self.vae = components["vae"].requires_grad_(False)
        given, text = components["transformer"], components["text_encoder"]
        config = replace(given.config, siglip_feat_dim=self.vision_config.hidden_size)
        self.transformer = ZImageTransformer2DModel(config)
        initialize_transformer(self.transformer, generator)
        self.transformer.load_state_dict({**self.transformer.state_dict(), **given.state_dict()})

        self.bpe = Tokenizer.from_file(str(base / "tokenizer" / "tokenizer.json"))
        self.bpe.add_special_tokens([VISION_START, VISION_END])
        save_tokenizer(self.folder / "tokenizer", self.bpe)
        self.words = load_tokenizer(self.folder / "tokenizer")
        rows = max(self.bpe.get_vocab_size(), text.config.vocab_size)
        self.text_config = replace(text.config, vocab_size=rows)
        self.text_encoder = TextEncoder(self.text_config)
        state = dict(text.state_dict())
        known = state["embed_tokens.weight"]
        more = self.text_config.vocab_size - len(known)
        new = torch.randn(more, known.shape[1], generator=generator) * known.std()
        state["embed_tokens.weight"] = torch.cat((known, new))
        self.text_encoder.load_state_dict(state)
        for model in (self.transformer, self.text_encoder):
            model.requires_grad_(True)

    def _models(self) -> dict[str, torch.nn.Module]:
        return {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "siglip": self.vision,
        }

    def _write(self, out: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        # What is never run: zeros, which pack well.
        text, vision = dict(states["text_encoder"]), dict(states["siglip"])
        for key, shape in full_model_shapes(self.text_config).items():
            text.setdefault(key, torch.zeros(shape))
        for key, shape in pooling_head_shapes(self.vision_config).items():
            vision.setdefault(key, torch.zeros(shape))
        checkpoint = Checkpoint(
            self.transformer.config,
            self.vae.config,
            self.text_config,
            self.bpe,
            {
                "transformer": states["transformer"],
                "vae": self.vae.state_dict(),
                "text_encoder": text,
                "siglip": vision,
            },
            (self.vision_config, self.processor_config),
        )
        write_checkpoint(out, checkpoint, dtype=torch.float16, shift=SHIFT)

    def _report(
        self, step: int, states: dict[str, dict[str, Tensor]], questions: list[EditQuestion]
    ) -> None:
        """Make, score and save some edits with the weights so far, as a user would."""
        folder = self.folder / "so-far"
        self._write(folder, states)
        components = load_from_local_dir(folder, device="cpu", dtype=torch.float32)
        made = edit_pictures(components, questions)
        score = score_edits(questions, made)
        self.log.write("edit", step=step, changed=score.changed, kept=score.kept)
        path = self.folder / "sheets" / f"edit-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = [
            Image.fromarray(picture)
            for question, after in zip(questions, made, strict=True)
            for picture in (question.picture, after)
        ]
        contact_sheet(pictures, 8).save(path)

    def _stage(
        self, name: str, parts: dict[str, Any], random: Random, generator: torch.Generator
    ) -> Stage:
        path = self.folder / f"{name}.pt"
        return Stage(path, name, self.budgets[name], self.log, parts, random, generator)

    def _random(self, purpose: str) -> Random:
        return Random(f"{self.settings.seed}/edit/{purpose}")

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._random(purpose).getrandbits(62))


def initialize_vision(vision: VisionEncoder, generator: torch.Generator) -> None:
    """Draw weights that keep variances, each tensor from one generator."""
    for name, parameter in vision.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "position_embedding" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
