"""Adapters against their makers' own code: PEFT, LyCORIS, and diffusers' pipeline end to end."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from lora_files import (
    FORMATS,
    MODULES,
    diffusers_metadata,
    small_transformer,
    train,
    write,
)
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Generator, Tensor, nn

from zimage_core import (
    LoraSwitcher,
    ZImageTransformer2DModel,
    generate,
    load_from_local_dir,
    load_lora,
)
from zimage_core.tiny.make import make_checkpoint

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "cap_embedder.1"]


@pytest.fixture(scope="module")
def model() -> ZImageTransformer2DModel:
    return small_transformer()


def shake(module: nn.Module, seed: int = 0) -> None:
    """Adapters begin at zero; give them something to say."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{name}: {float(error):.1e}"


PEFT_CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "LoRA, rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "LoRA, patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"to_q": 2, r"layers\.0\.attention\.to_k": 8},
        alpha_pattern={"to_v": 1, r"feed_forward\.w[13]": 9},
    ),
    "LoRA with bias": peft.LoraConfig(
        r=4, lora_alpha=6, lora_bias=True, target_modules=["cap_embedder.1", "t_embedder.mlp.0"]
    ),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "LoHa": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "LoKr of factors": peft.LoKrConfig(
        r=2, alpha=6, decompose_both=True, decompose_factor=8, target_modules=TARGETS
    ),
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_peft_merges_the_same(model: ZImageTransformer2DModel, tmp_path: Path, case: str) -> None:
    base = copy.deepcopy(model)
    base.config = {"model_type": "custom"}  # type: ignore[assignment]  # PEFT looks for a mapping
    trained = peft.get_peft_model(base, copy.deepcopy(PEFT_CONFIGS[case]))  # type: ignore[arg-type]
    shake(trained)
    trained.save_pretrained(str(tmp_path))
    expected = dict(trained.merge_and_unload().named_parameters())

    merged = copy.deepcopy(model)
    adapter = load_lora(tmp_path / "adapter_model.safetensors", merged)
    LoraSwitcher(merged, {"a": adapter}).apply({"a": 1.0})
    assert adapter.report.unmatched == ()
    changed = 0
    for name, parameter in merged.named_parameters():
        assert_close(parameter, expected[name], name)
        changed += not torch.equal(parameter, model.get_parameter(name))
    assert changed == len(adapter.parameters) >= 2


def train_lycoris(
    kind: Any, linear: nn.Linear, scale: float, options: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors as LyCORIS saves them, and the weight that its forward has."""
    bare = nn.Linear(linear.in_features, linear.out_features, bias=False)
    bare.weight.data.copy_(linear.weight)
    module = kind("name", bare, multiplier=scale, lora_dim=4, alpha=3.0, **options).eval()
    shake(module, seed=5)
    module.apply_to()
    with torch.no_grad():
        weight = bare(torch.eye(linear.in_features)).T
        return {key: t.clone() for key, t in module.custom_state_dict().items()}, weight


LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon, DoRA by row": (LoConModule, {"weight_decompose": True}),
    "LoCon, DoRA by column": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": (LohaModule, {}),
    "LoHa, DoRA": (LohaModule, {"weight_decompose": True}),
    "LoHa, rs": (LohaModule, {"rs_lora": True}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr, whole": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoKr, DoRA": (LokrModule, {"factor": 4, "weight_decompose": True}),
    "LoKr, both in factors": (LokrModule, {"factor": 16, "decompose_both": True}),
}


# A DoRA at full strength alone: LyCORIS weakens one in another way than ComfyUI, whose way is ours.
@pytest.mark.parametrize(
    ("case", "scale"),
    [(case, 1.0) for case in LYCORIS] + [(case, 0.6) for case in LYCORIS if "DoRA" not in case],
)
def test_lycoris_computes_the_same(
    model: ZImageTransformer2DModel, tmp_path: Path, case: str, scale: float
) -> None:
    kind, options = LYCORIS[case]
    expected, tensors = {}, {}
    for name in ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "cap_embedder.1"):
        saved, expected[name] = train_lycoris(kind, model.get_submodule(name), scale, options)
        stem = "lycoris_" + name.replace(".", "_")
        tensors |= {f"{stem}.{key}": tensor for key, tensor in saved.items()}
    adapter = load_lora(write(tmp_path / "l.safetensors", tensors), model)
    assert adapter.report.unmatched == ()
    merged = copy.deepcopy(model)
    LoraSwitcher(merged, {"a": adapter}).apply({"a": scale})
    for name, weight in expected.items():
        assert_close(merged.get_submodule(name).weight, weight, name)
        own = model.get_submodule(name).weight
        assert (weight - own).abs().max() > 0.01 * own.abs().max()


# diffusers, from the file to the picture.

PROMPT = "a red circle above a blue square"
SETTINGS: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("judges") / "tiny",
        dtype=torch.float32,
        dim=48,
        layers=2,
        axes_dims=(8, 8, 8),
        axes_lens=(256, 64, 64),
    )


@pytest.fixture(scope="module")
def components(checkpoint: Path) -> dict[str, Any]:
    return load_from_local_dir(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    pipeline = diffusers.ZImagePipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_images_equal_diffusers(components: dict[str, Any], reference: Any, tmp_path: Path) -> None:
    transformer = components["transformer"]

    def ours(output_type: str) -> Any:
        seed = Generator().manual_seed(7)
        return generate(
            **components, prompt=PROMPT, generator=seed, output_type=output_type, **SETTINGS
        )

    def theirs(output_type: str) -> Any:
        seed = Generator().manual_seed(7)
        return reference(
            prompt=PROMPT, generator=seed, guidance_scale=0.0, output_type=output_type, **SETTINGS
        ).images

    def compare(case: str) -> Tensor:
        latents = ours("latent")
        assert_close(latents, theirs("latent"), case)
        images = torch.from_numpy(ours("np"))
        assert_close(images, torch.from_numpy(theirs("np")), case)
        return latents

    plain = compare("none")
    # Those that diffusers can load; fused qkv, LoKr, LoHa and DoRA it cannot.
    for form, alpha, scale in [
        ("diffusers", None, 0.75),
        ("diffusers", 6.0, 0.75),
        ("ai-toolkit", None, 1.0),
        ("diffsynth", None, 0.5),
        ("kohya, musubi-tuner", 2.0, 1.5),
        ("dots with copies", 2.0, 1.0),
    ]:
        pairs = train(transformer, MODULES, alpha=alpha, strength=0.5)
        metadata = diffusers_metadata(pairs) if form == "diffusers" and alpha else None
        path = write(tmp_path / "lora.safetensors", FORMATS[form][0](pairs), metadata=metadata)
        reference.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
        reference.set_adapters("a", scale)
        switcher = LoraSwitcher(transformer, {"a": load_lora(path, transformer)})
        switcher.apply({"a": scale})
        adapted = compare(form)
        assert (adapted - plain).abs().max() > 0.02 * plain.abs().max(), form
        reference.delete_adapters("a")
        reference.unload_lora_weights()
        switcher.apply({})
        assert torch.equal(ours("latent"), plain)


def test_two_adapters_at_once_equal_diffusers(
    components: dict[str, Any], reference: Any, tmp_path: Path
) -> None:
    transformer = components["transformer"]
    adapters = {}
    for name, seed in (("ink", 1), ("pixel", 2)):
        pairs = train(transformer, MODULES[:8], seed=seed, strength=0.5)
        path = write(tmp_path / f"{name}.safetensors", FORMATS["diffusers"][0](pairs))
        reference.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=name)
        adapters[name] = load_lora(path, transformer)
    reference.set_adapters(["ink", "pixel"], [0.75, 0.4])
    switcher = LoraSwitcher(transformer, adapters)
    switcher.apply({"ink": 0.75, "pixel": 0.4})
    common = {"prompt": PROMPT, "output_type": "latent", **SETTINGS}
    found = generate(**components, generator=Generator().manual_seed(3), **common)
    expected = reference(generator=Generator().manual_seed(3), guidance_scale=0.0, **common).images
    assert isinstance(found, Tensor)
    assert_close(found, expected, "both")
    reference.unload_lora_weights()
    switcher.apply({})


def test_what_diffusers_saves_is_read(
    components: dict[str, Any], reference: Any, tmp_path: Path
) -> None:
    """A training script's own last lines: `add_adapter`, then `save_lora_weights`."""
    from diffusers.training_utils import _collate_lora_metadata

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], use_rslora=True)
    reference.transformer.add_adapter(config)
    shake(reference.transformer)
    reference.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(reference.transformer),
        **_collate_lora_metadata({"transformer": reference.transformer}),
    )
    transformer = components["transformer"]
    adapter = load_lora(tmp_path / "pytorch_lora_weights.safetensors", transformer)
    name = "layers.1.attention.to_v"
    layer = reference.transformer.get_submodule(name)
    weight = transformer.get_submodule(name).weight
    assert_close(adapter.delta(f"{name}.weight", weight), layer.get_delta_weight("default"), name)
    assert len(adapter.parameters) == 2 * 4
    reference.transformer.delete_adapters("default")
