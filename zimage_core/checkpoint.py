"""A checkpoint on disk: its files, their tensors by header, and whether all of it fits.

Everything here reads JSON and the headers of weight files, never weights, so that a folder of
30 GB is checked in well under a second and a broken one is found before any of it is loaded.

The layout is diffusers': `model_index.json` and the folders `scheduler`, `tokenizer`,
`text_encoder`, `transformer`, `vae`. Each of the last three may be replaced by a file or a folder
of its own: `transformer=`, `vae=`, `text_encoder=`. Where pictures can be edited there are also
`siglip` and `siglip_processor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zimage_core.chat_template import TEMPLATE_FILE, check_template
from zimage_core.component import Component, open_component
from zimage_core.config import (
    AutoencoderConfig,
    CheckpointError,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
    VisionProcessorConfig,
    read_json,
    read_json_object,
    shown,
)
from zimage_core.model_index import check_model_index
from zimage_core.model_kind import KINDS, VISION, Kind
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.weight_files import (
    find_weight_files,
    open_weight_file,
    open_weight_folder,
    refuse_all,
)

Part = Path | str | None
"""A file or folder that replaces a model of the checkpoint's folder; None for what is there."""

PUBLISHED = Path(__file__).parent / "published"
"""Configurations of the published Z-Image models, used where a checkpoint has none."""

PROCESSOR_FILE = "siglip_processor/preprocessor_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found complete: nothing of it is loaded yet.

    Attributes:
        components: by the name of their folder.
        notes: what a user should know, a sentence each.
        vision_config: of the component `siglip`; None where the checkpoint takes no pictures.
        processor_config: how pictures are brought to it.
    """

    transformer_config: TransformerConfig
    autoencoder_config: AutoencoderConfig
    text_encoder_config: TextEncoderConfig
    scheduler: FlowMatchEulerDiscreteScheduler
    components: Mapping[str, Component]
    notes: tuple[str, ...] = ()
    vision_config: VisionConfig | None = None
    processor_config: VisionProcessorConfig | None = None


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        kind: which model.
        config: its `config.json`.
        folder: of its weights; None where they are in `file`.
        file: a single file.
    """

    kind: Kind
    config: Path
    folder: Path | None
    file: Path | None = None

    @property
    def is_published(self) -> bool:
        """Whether the configuration is the published one, for want of another."""
        return self.config.parent == PUBLISHED

    @property
    def note(self) -> str:
        """What a user should know where the configuration is the published one."""
        return (
            f"{self.file}: no {self.kind.name}/config.json is given beside it: the published "
            "configuration of Z-Image is used, and all shapes agree with it"
        )

    def read_config(self) -> Any:
        """Read the configuration. Raises `CheckpointError`."""
        return self.kind.config.from_json(self.config)

    def open(self, config: Any) -> Component:
        """Find the model's tensors.

        Raises:
            CheckpointError: see `open_component`; where the published configuration was taken,
                the message says so.
        """
        if self.file is None:
            assert self.folder is not None
            files = open_weight_folder(self.folder, self.kind.stem)
            return open_component(
                self.kind, config, files, asked_by="config.json", single_file=False
            )
        asked_by = "the published configuration" if self.is_published else str(self.config)
        try:
            return open_component(
                self.kind, config, open_weight_file(self.file), asked_by=asked_by, single_file=True
            )
        except CheckpointError as error:
            if not self.is_published:
                raise
            raise CheckpointError(
                f"{error}\n{self.file}: was compared with the published configuration of Z-Image, "
                f"since no {self.kind.name}/config.json is given beside it"
            ) from error


def find_source(kind: Kind, root: Path | None, part: Part) -> Source:
    """Say where a model comes from.

    Args:
        kind: which model.
        root: the checkpoint's folder; None where there is none.
        part: what replaces the model in it: a file, the model's own folder, or a checkpoint's.

    Raises:
        CheckpointError: `part` does not exist.
    """
    inside = None if root is None else root / kind.name
    if part is None:
        assert inside is not None
        return Source(kind, inside / "config.json", inside)
    path = Path(part)
    if path.is_dir():
        inner = path / kind.name
        folder = inner if (inner / "config.json").is_file() else path
        return Source(kind, folder / "config.json", folder)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such {kind.words}; allowed: a file or a folder")
    config = None if inside is None else inside / "config.json"
    if config is None or not config.is_file():
        config = PUBLISHED / f"{kind.name}.json"
    return Source(kind, config, None, path)


def open_checkpoint(
    model_dir: Path | str,
    *,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> Checkpoint:
    """Check a checkpoint from its JSON and headers.

    Args:
        model_dir: its folder. What is replaced need not be there.
        transformer: a file or folder to take the transformer from instead.
        vae: the same for the autoencoder.
        text_encoder: the same for the text encoder.

    Raises:
        CheckpointError: anything is missing, unexpected, mis-shaped, truncated or corrupt; all that
            was found, one problem a line, each with its file.
    """
    root = Path(model_dir)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    takes_pictures = check_model_index(root)
    problems: list[str] = []

    def attempt(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except CheckpointError as error:
            problems.append(str(error))
            return None

    _ = attempt(_check_tokenizer, root / "tokenizer")
    read = VisionProcessorConfig.from_json
    processor = attempt(read, root / PROCESSOR_FILE) if takes_pictures else None
    scheduler = attempt(
        FlowMatchEulerDiscreteScheduler.from_json, root / "scheduler" / "scheduler_config.json"
    )
    sources: dict[str, Source | None] = {
        name: attempt(find_source, kind, root, parts.get(name))
        for name, kind in _kinds(takes_pictures).items()
    }
    configs: dict[str, Any] = {
        name: attempt(s.read_config) if s else None for name, s in sources.items()
    }
    components = {
        name: attempt(source.open, configs[name])
        for name, source in sources.items()
        if source is not None and configs[name] is not None
    }
    problems += _misfits(root, sources, configs, processor)
    refuse_all(problems)
    notes = [note for component in components.values() for note in component.notes]
    notes += [source.note for source in sources.values() if source and source.is_published]
    return Checkpoint(
        configs["transformer"],
        configs["vae"],
        configs["text_encoder"],
        scheduler,
        components,
        tuple(notes),
        configs.get(VISION.name),
        processor,
    )


def _kinds(takes_pictures: bool) -> dict[str, Kind]:
    return {**KINDS, VISION.name: VISION} if takes_pictures else KINDS


def _misfits(
    root: Path,
    sources: Mapping[str, Source | None],
    configs: Mapping[str, Any],
    processor: VisionProcessorConfig | None,
) -> list[str]:
    """Numbers in which the models do not fit each other."""
    problems = []
    transformer, vae, text = (configs[name] for name in ("transformer", "vae", "text_encoder"))
    vision = configs.get(VISION.name)
    takes = transformer and transformer.siglip_feat_dim
    if transformer and (takes is not None) != (VISION.name in sources):
        assert sources["transformer"] is not None
        names = "does not name" if takes else "names"
        problems.append(
            f"{sources['transformer'].config}: siglip_feat_dim is {shown(takes)}, but "
            f"{root / 'model_index.json'} {names} siglip, which sees the pictures"
        )
    if takes and vision and vision.hidden_size != takes:
        problems.append(
            f"{root / VISION.name / 'config.json'}: hidden_size is {vision.hidden_size}, but the "
            f"transformer's siglip_feat_dim is {takes}"
        )
    if vision and processor and processor.patch_size != vision.patch_size:
        problems.append(
            f"{root / PROCESSOR_FILE}: patch_size is {processor.patch_size}, but "
            f"{root / VISION.name / 'config.json'} has {vision.patch_size}"
        )
    if transformer and vae and vae.latent_channels != transformer.in_channels:
        assert sources["vae"] is not None
        problems.append(
            f"{sources['vae'].config}: latent_channels is {vae.latent_channels}, but the "
            f"transformer's in_channels is {transformer.in_channels}"
        )
    if transformer and text and text.hidden_size != transformer.cap_feat_dim:
        assert sources["text_encoder"] is not None
        problems.append(
            f"{sources['text_encoder'].config}: hidden_size is {text.hidden_size}, but the "
            f"transformer's cap_feat_dim is {transformer.cap_feat_dim}"
        )
    return problems


def checkpoint_files(
    model_dir: Path | str,
    *,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> list[Path]:
    """List every file that loading reads, sorted.

    Args:
        model_dir: as for `open_checkpoint`, like all the others.
        transformer: see `model_dir`.
        vae: see `model_dir`.
        text_encoder: see `model_dir`.

    Raises:
        CheckpointError: a file that loading needs is missing, or an index cannot be read.
    """
    named = named_checkpoint_files(
        model_dir, transformer=transformer, vae=vae, text_encoder=text_encoder
    )
    return sorted(set(named.values()))


def named_checkpoint_files(
    model_dir: Path | str,
    *,
    transformer: Part = None,
    vae: Part = None,
    text_encoder: Part = None,
) -> dict[str, Path]:
    """Name every file that loading reads by what it is for, wherever it lies.

    A model's files are `<model>/<file name>`, a single file is `<model><ending>`:
    `vae/config.json`, `transformer.gguf`.

    Args:
        model_dir: as for `open_checkpoint`, like all the others.
        transformer: see `model_dir`.
        vae: see `model_dir`.
        text_encoder: see `model_dir`.

    Raises:
        CheckpointError: see `checkpoint_files`.
    """
    root = Path(model_dir)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    takes_pictures = check_model_index(root)
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        *([PROCESSOR_FILE] if takes_pictures else []),
    ]
    files = {name: root / name for name in names}
    template = f"tokenizer/{TEMPLATE_FILE}"
    if (root / template).is_file():
        files[template] = root / template
    for name, kind in _kinds(takes_pictures).items():
        source = find_source(kind, root, parts.get(name))
        files[f"{name}/config.json"] = source.config
        if source.file is not None:
            files[name + source.file.suffix] = source.file
        else:
            assert source.folder is not None
            weights, _ = find_weight_files(source.folder, kind.stem)
            files |= {f"{name}/{path.name}": path for path in weights}
    refuse_all(f"{path}: file is missing" for path in files.values() if not path.is_file())
    return files


def _check_tokenizer(folder: Path) -> None:
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)
    if "chat_template" not in config and not (folder / TEMPLATE_FILE).is_file():
        raise CheckpointError(f"{config_path}: missing key 'chat_template'")
    check_template(folder, config)
    if "model" not in read_json_object(folder / "tokenizer.json"):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: missing key 'model'")
