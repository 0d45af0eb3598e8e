"""Configurations: published files are read, anything else is refused by file, key and value."""

import json

import pytest

from zimage_core.config import (
    AutoencoderConfig,
    CheckpointError,
    TextEncoderConfig,
    TransformerConfig,
    read_json_object,
)

# The keys and values of the published folders.
TURBO = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.36.0.dev0",
    "_name_or_path": "flux-dev",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = [(TransformerConfig, TURBO), (AutoencoderConfig, VAE), (TextEncoderConfig, QWEN3)]


def written(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(params=PUBLISHED, ids=lambda pair: pair[0].__name__)
def published(request):
    return request.param


def test_published_transformer_of_both_releases(tmp_path):
    turbo = TransformerConfig.from_json(written(tmp_path, TURBO))
    assert turbo.axes_lens == (1536, 512, 512)
    assert (turbo.dim, turbo.n_layers, turbo.siglip_feat_dim) == (3840, 30, None)
    base = TransformerConfig.from_json(written(tmp_path, {**TURBO, "siglip_feat_dim": None}))
    assert base == turbo


def test_published_autoencoder_and_text_encoder(tmp_path):
    vae = AutoencoderConfig.from_json(written(tmp_path, VAE))
    assert (vae.scaling_factor, vae.shift_factor) == (0.3611, 0.1159)
    assert vae.block_out_channels == (128, 256, 512, 512)
    qwen = TextEncoderConfig.from_json(written(tmp_path, QWEN3))
    assert (qwen.rope_theta, qwen.num_hidden_layers) == (1e6, 36)
    assert isinstance(qwen.rope_theta, float)


def test_text_encoder_as_transformers_writes_it(tmp_path):
    from transformers import Qwen3Config

    ours = {key: QWEN3[key] for key in ("hidden_size", "num_hidden_layers", "rope_theta")}
    Qwen3Config(**ours).save_pretrained(tmp_path)
    config = TextEncoderConfig.from_json(tmp_path / "config.json")
    assert (config.rope_theta, config.hidden_size) == (1e6, 2560)


def test_every_key_that_shapes_the_model_is_required(tmp_path, published):
    kind, values = published
    optional = {"siglip_feat_dim", "latents_mean", "latents_std", "sample_size", "force_upcast"}
    optional |= {"use_sliding_window", "rope_scaling", "layer_types"}
    required = set(kind.__dataclass_fields__) - optional
    assert len(required) >= 12
    for key in required:
        path = written(tmp_path, {k: v for k, v in values.items() if k != key})
        with pytest.raises(CheckpointError) as caught:
            kind.from_json(path)
        assert str(path) in str(caught.value) and f"missing key '{key}'" in str(caught.value)


def test_unknown_key_is_refused_and_underscored_is_not(tmp_path, published):
    kind, values = published
    kind.from_json(written(tmp_path, {**values, "_commit_hash": "x"}))
    with pytest.raises(CheckpointError, match="unknown key 'depth' with value 7"):
        kind.from_json(written(tmp_path, {**values, "depth": 7}))


@pytest.mark.parametrize(
    ("kind", "values", "key", "value"),
    [
        (TransformerConfig, TURBO, "dim", "3840"),
        (TransformerConfig, TURBO, "dim", 3840.0),
        (TransformerConfig, TURBO, "n_layers", True),
        (TransformerConfig, TURBO, "n_layers", 0),
        (TransformerConfig, TURBO, "qk_norm", 1),
        (TransformerConfig, TURBO, "norm_eps", float("nan")),
        (TransformerConfig, TURBO, "axes_dims", []),
        (TransformerConfig, TURBO, "axes_dims", [32, 48, 48.5]),
        (TransformerConfig, TURBO, "axes_dims", [32, 48, 32]),
        (TransformerConfig, TURBO, "axes_lens", [1536, 512]),
        (TransformerConfig, TURBO, "n_kv_heads", 10),
        (TransformerConfig, TURBO, "all_patch_size", [2, 4]),
        (AutoencoderConfig, VAE, "shift_factor", None),
        (AutoencoderConfig, VAE, "act_fn", "relu"),
        (AutoencoderConfig, VAE, "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        (AutoencoderConfig, VAE, "up_block_types", ["UpDecoderBlock2D"] * 3),
        (AutoencoderConfig, VAE, "norm_num_groups", 96),
        (AutoencoderConfig, VAE, "latents_mean", [0.0] * 16),
        (TextEncoderConfig, QWEN3, "model_type", "qwen2"),
        (TextEncoderConfig, QWEN3, "use_sliding_window", True),
        (TextEncoderConfig, QWEN3, "rope_scaling", {"type": "yarn", "factor": 4.0}),
        (TextEncoderConfig, QWEN3, "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        (TextEncoderConfig, QWEN3, "layer_types", ["sliding_attention"] * 36),
        (TextEncoderConfig, QWEN3, "num_key_value_heads", 5),
        (TextEncoderConfig, QWEN3, "num_hidden_layers", 1),
    ],
)
def test_wrong_value_is_named_with_file_and_key(tmp_path, kind, values, key, value):
    path = written(tmp_path, {**values, key: value})
    with pytest.raises(CheckpointError) as caught:
        kind.from_json(path)
    assert str(path) in str(caught.value)
    assert key in str(caught.value) or key == "rope_parameters"


def test_edit_checkpoint_has_the_width_of_visual_features(tmp_path):
    config = TransformerConfig.from_json(written(tmp_path, {**TURBO, "siglip_feat_dim": 1152}))
    assert config.siglip_feat_dim == 1152
    with pytest.raises(CheckpointError, match=r"siglip_feat_dim is 0; allowed: null or a whole"):
        TransformerConfig.from_json(written(tmp_path, {**TURBO, "siglip_feat_dim": 0}))


def test_all_problems_at_once(tmp_path):
    path = written(tmp_path, {**TURBO, "dim": None, "depth": 1, "n_heads": "x"})
    with pytest.raises(CheckpointError) as caught:
        TransformerConfig.from_json(path)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"[]", "JSON object"), (b"\xff\xfe{", "cannot be read")],
)
def test_no_json_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="file is missing"):
        read_json_object(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        TransformerConfig.from_json(path)
