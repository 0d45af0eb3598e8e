"""Float8 weights, cast and scaled: each comes to its number times its scale, in float32."""

import json

import foreign_layouts as foreign
import pytest
import torch

from zimage_core.config import CheckpointError
from zimage_core.loader import check_checkpoint, load_from_local_dir
from zimage_core.tiny.make import make_checkpoint

SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}
PREFIX = "model.diffusion_model."
LAYER = "layers.0.feed_forward.w1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny", dtype=torch.float32, seed=3, **SMALL
    )


def load(base, **options):
    return load_from_local_dir(base, **{"device": "cpu", "dtype": torch.float32, **options})


def split(values):
    """Values of ComfyUI's names under the model's own."""
    out = {}
    for key, value in values.items():
        if ".attention.qkv." in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("qkv", f"to_{letter}")] = part
        else:
            for theirs, ours in (
                ("attention.out.", "attention.to_out.0."),
                ("q_norm.", "norm_q."),
                ("k_norm.", "norm_k."),
                ("x_embedder.", "all_x_embedder.2-1."),
                ("final_layer.", "all_final_layer.2-1."),
            ):
                key = key.replace(theirs, ours)
            out[key] = value
    return out


def assert_values(model, values, dtype=torch.float32):
    state = model.state_dict()
    assert state.keys() == values.keys()
    for key, tensor in state.items():
        assert tensor.dtype == dtype and torch.equal(tensor, values[key].to(dtype)), key


def refused(base, path, *parts):
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(base, transformer=path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_float8_is_cast(base, tmp_path, dtype, asked):
    state = {key: t.to(dtype) for key, t in foreign.transformer_state(base).items()}
    path = foreign.save(foreign.comfy_transformer(state), tmp_path / "t.safetensors")
    model = load(base, transformer=path, dtype=asked)["transformer"]
    assert_values(model, {key: tensor.float() for key, tensor in state.items()}, asked)


@pytest.mark.parametrize(
    "form",
    [
        {"old": True},
        {"old": False, "marker": "tensors"},
        {"old": False, "marker": "metadata"},
        {"old": False, "rowwise": True},
        {"old": False, "dtype": torch.float8_e5m2},
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_scaled_float8(base, tmp_path, form, asked):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, values = foreign.scaled_fp8(fused, **form)
    assert state[f"{LAYER}.weight"].element_size() == 1
    path = foreign.save(state, tmp_path / "t.safetensors", metadata)
    assert_values(load(base, transformer=path, dtype=asked)["transformer"], split(values), asked)


def test_scaled_float8_is_near_what_it_was_made_from(base, tmp_path):
    """That the scales are divided out the right way round, for a loader and a maker alike."""
    origin = foreign.transformer_state(base)
    state, metadata, _ = foreign.scaled_fp8(foreign.comfy_transformer(origin), old=True)
    path = foreign.save(state, tmp_path / "t.safetensors", metadata)
    for key, tensor in load(base, transformer=path)["transformer"].state_dict().items():
        assert (tensor - origin[key]).abs().max() <= origin[key].abs().max() / 16, key


def test_scaled_text_encoder(base, tmp_path):
    origin = foreign.text_state(base)
    state, metadata, values = foreign.scaled_fp8(origin, old=False)
    path = foreign.save(state, tmp_path / "qwen_fp8_mixed.safetensors", metadata)
    model = load(base, text_encoder=path)["text_encoder"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[f"model.{key}"]), key


@pytest.mark.parametrize("names_have_prefix", [True, False])
def test_metadata_of_a_file_with_several_models(base, tmp_path, names_have_prefix):
    """A layer of another model does not concern this one, in whichever format it is."""
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, values = foreign.scaled_fp8(fused, old=False, marker="metadata")
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    if names_have_prefix:
        layers = {PREFIX + name: settings for name, settings in layers.items()}
    other = "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj"
    layers[other] = {"format": "nvfp4"}
    state = {
        **foreign.prefixed(state, PREFIX),
        f"{other}.weight": torch.zeros(2, 2, dtype=torch.uint8),
        f"{other}.weight_scale_2": torch.ones(()),
    }
    path = tmp_path / "all.safetensors"
    foreign.save(state, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    assert_values(load(base, transformer=path)["transformer"], split(values))


def test_layers_that_are_named_by_format_alone(base, tmp_path):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, values = foreign.scaled_fp8(fused, old=False, marker="metadata")
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    layers = {name: settings["format"] for name, settings in layers.items()}
    path = tmp_path / "t.safetensors"
    foreign.save(state, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    assert_values(load(base, transformer=path)["transformer"], split(values))


def test_scale_of_an_unquantised_layer_in_an_old_file_counts(base, tmp_path):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, values = foreign.scaled_fp8(fused, old=True, skip=("w1", "embedder", "final"))
    assert state[f"{LAYER}.weight"].dtype == torch.float32
    state[f"{LAYER}.scale_weight"] = torch.tensor(2.0)
    values[f"{LAYER}.weight"] = values[f"{LAYER}.weight"] * 2
    path = foreign.save(state, tmp_path / "t.safetensors", metadata)
    assert_values(load(base, transformer=path)["transformer"], split(values))


def variant(base, tmp_path, change, **form):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, _ = foreign.scaled_fp8(fused, **{"old": False, **form})
    change(state, metadata)
    return foreign.save(state, tmp_path / "t.safetensors", metadata)


def layer_json(**settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def test_missing_scale(base, tmp_path):
    path = variant(base, tmp_path, lambda s, m: s.pop(f"{LAYER}.weight_scale"))
    refused(base, path, f"missing tensor '{LAYER}.weight_scale'", "is marked as float8_e4m3fn")
    path = variant(base, tmp_path, lambda s, m: s.pop(f"{LAYER}.scale_weight"), old=True)
    refused(base, path, f"missing tensor '{LAYER}.scale_weight'", "in a file marked scaled_fp8")


def test_scale_without_weight_or_of_another_shape(base, tmp_path):
    path = variant(base, tmp_path, lambda s, m: s.update({"x.weight_scale": torch.ones(())}))
    refused(base, path, "tensor 'x.weight_scale' is the scale of 'x.weight', which is not there")
    path = variant(base, tmp_path, lambda s, m: s.update({f"{LAYER}.weight_scale": torch.ones(7)}))
    refused(
        base,
        path,
        f"tensor '{LAYER}.weight_scale' has shape [7], but scales '{LAYER}.weight' of shape "
        "[170, 64]; allowed: one number, or one for each of its 170 rows",
    )
    integers = torch.ones((), dtype=torch.int32)
    path = variant(base, tmp_path, lambda s, m: s.update({f"{LAYER}.weight_scale": integers}))
    refused(base, path, "is a scale stored as I32; allowed: F32, F16, BF16")


def test_integers_with_scales_and_no_marker(base, tmp_path):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, _ = foreign.scaled_fp8(fused, old=False, marker="none")
    state = {
        key: t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t for key, t in state.items()
    }
    path = foreign.save(state, tmp_path / "t.safetensors", metadata)
    refused(base, path, "is stored as I8 with the scale '", "which is not supported")


def test_scales_count_without_any_marker(base, tmp_path):
    fused = foreign.comfy_transformer(foreign.transformer_state(base))
    state, metadata, values = foreign.scaled_fp8(fused, old=False, marker="none")
    path = foreign.save(state, tmp_path / "t.safetensors", metadata)
    assert_values(load(base, transformer=path)["transformer"], split(values))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"format": "nvfp4"}, "is quantised as nvfp4, which is not supported"),
        (
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
            "is quantised as int8_tensorwise with convrot, convrot_groupsize, which is not",
        ),
        ({"format": "float8_e4m3fn", "convrot": True}, "float8_e4m3fn with convrot"),
        ({"format": "mxfp8"}, "mxfp8"),
        ({"format": "float8_e4m3fn_blockwise", "group_size": 64}, "float8_e4m3fn_blockwise"),
        ({}, "is {}; allowed: an object with a format"),
    ],
)
def test_other_formats_are_refused_by_name(base, tmp_path, settings, what):
    def mark(state, metadata):
        state[f"{LAYER}.comfy_quant"] = layer_json(**settings)

    refused(base, variant(base, tmp_path, mark), f"'{LAYER}.comfy_quant'", what)

    def mark_in_metadata(state, metadata):
        metadata["_quantization_metadata"] = json.dumps({"layers": {LAYER: settings}})

    path = variant(base, tmp_path, mark_in_metadata, marker="metadata")
    refused(base, path, f"layer '{LAYER}'", what)


def test_markers_that_cannot_be_read(base, tmp_path):
    def spoil(state, metadata):
        state[f"{LAYER}.comfy_quant"] = torch.tensor([1, 2], dtype=torch.uint8)

    refused(base, variant(base, tmp_path, spoil), f"'{LAYER}.comfy_quant' cannot be read as JSON")
    for text in ("{", "[]", '{"layers": 3}'):
        path = variant(
            base,
            tmp_path,
            lambda s, m, text=text: m.update(_quantization_metadata=text),
            marker="metadata",
        )
        refused(base, path, "_quantization_metadata in its metadata is not JSON with an object")
    marker = torch.zeros(2, dtype=torch.int8)
    path = variant(base, tmp_path, lambda s, m: s.update(scaled_fp8=marker), old=True)
    refused(base, path, "marker 'scaled_fp8' is stored as I8; allowed: F8_E4M3")


def test_marked_layer_that_is_stored_otherwise_or_not_at_all(base, tmp_path):
    def plain(state, metadata):
        state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"].float()

    path = variant(base, tmp_path, plain)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(base, transformer=path)
    assert f"tensor '{LAYER}.weight' is stored as F32, but marked as float8_e4m3fn" in str(
        caught.value
    )

    def gone(state, metadata):
        metadata["_quantization_metadata"] = json.dumps({"layers": {"x.y": "float8_e4m3fn"}})

    path = variant(base, tmp_path, gone, marker="metadata")
    refused(base, path, "missing tensor 'x.y.weight', which is marked as float8_e4m3fn")
