"""The text encoder computes transformers' `hidden_states[-2]`; batches equal singles."""

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from zimage_core.config import TextEncoderConfig
from zimage_core.qwen3 import rotary_table
from zimage_core.text_encoder import (
    TextEncoder,
    apply_template,
    encode_prompts,
    full_model_shapes,
    load_tokenizer,
    text_encoder_shapes,
    tokenize,
)
from zimage_core.tiny.tokenizer import save_tokenizer, train_tokenizer

CONFIGS = {
    "grouped": {},
    "one-key-head": {"num_key_value_heads": 1, "num_hidden_layers": 2},
    "plain-heads": {"num_key_value_heads": 4, "head_dim": 8},
    "biases": {"attention_bias": True, "rope_theta": 1e4, "hidden_size": 40},
}


def pair(folder, **changes):
    """Make our encoder and transformers' with the same random weights, norms included."""
    values = {
        "vocab_size": 700,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e6,
        "attn_implementation": "sdpa",
        **changes,
    }
    theirs = Qwen3Model(Qwen3Config(**values)).eval()
    theirs.config.save_pretrained(folder)
    ours = TextEncoder(TextEncoderConfig.from_json(folder / "config.json")).eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(tensor.shape, generator=generator) * 0.2 + ("norm" in key)
        for key, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    last = f"layers.{theirs.config.num_hidden_layers - 1}."
    ours.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith(last) and k != "norm.weight"}
    )
    return ours, theirs


@pytest.fixture(params=CONFIGS, scope="module")
def models(request, tmp_path_factory):
    return pair(tmp_path_factory.mktemp("qwen3"), **CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, train_tokenizer(600))
    return load_tokenizer(folder)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def random_ids(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 700, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def test_padded_batch_equals_hidden_states_of_transformers(models):
    ours, theirs = models
    rows = random_ids(3, 40, 17)
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    reference = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    for features in (ours(ids), ours(ids, mask)):
        assert features.shape == reference.shape
        assert features.isfinite().all()
        for i, row in enumerate(rows):
            assert relative(features[i, : len(row)], reference[i, : len(row)]) < 1e-5


@torch.no_grad()
def test_padded_batch_equals_singles(models):
    ours, _ = models
    rows = random_ids(1, 33, 600)
    ids = torch.full((3, 600), 5)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    batch = ours(ids)
    for i, row in enumerate(rows):
        assert relative(batch[i, : len(row)], ours(row[None])[0]) < 1e-5


@torch.no_grad()
def test_left_padding_under_a_mask_gives_no_nan(models):
    ours, _ = models
    mask = torch.tensor([[0, 0, 1, 1]])
    assert ours(torch.ones(1, 4, dtype=torch.long), mask).isfinite().all()


@torch.no_grad()
def test_bfloat16_stays_near_transformers(models):
    ours, theirs = models
    (row,) = random_ids(20)
    reference = theirs(row[None], output_hidden_states=True).hidden_states[-2]
    ours.to(torch.bfloat16)
    try:
        features = ours(row[None])
        assert features.dtype == torch.bfloat16
        assert relative(features.float(), reference) < 0.05
    finally:
        ours.float()


def test_shapes_are_those_of_the_modules(models):
    for shapes, model in zip((text_encoder_shapes, full_model_shapes), models, strict=True):
        state = model.state_dict()
        assert shapes(models[0].config) == {key: tuple(state[key].shape) for key in state}


@torch.no_grad()
def test_empty_encoder_filled_computes_the_same(models):
    original, _ = models
    config, state = original.config, original.state_dict()
    with torch.device("meta"):
        encoder = TextEncoder(config)
    encoder.load_state_dict(state, assign=True)
    (row,) = random_ids(90)
    assert torch.equal(encoder(row[None]), original(row[None]))


def test_rotary_angles_are_exact_far_from_the_start():
    # In float32, whatever the model is cast to: bfloat16 frequencies would turn the last token of
    # a long prompt by another angle.
    theta, head_dim, length = 1e6, 128, 512
    cos, sin = rotary_table(length, head_dim, theta, torch.device("cpu"))
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * theta ** (-channels / head_dim)
    expected = angles.repeat(1, 2)
    assert cos.dtype == torch.float32
    assert torch.allclose(cos.double(), expected.cos(), atol=1e-4)
    assert torch.allclose(sin.double(), expected.sin(), atol=1e-4)


@torch.no_grad()
def test_copies_compute_with_their_own_weights(models):
    ours, _ = models
    (row,) = random_ids(5)
    before = ours(row[None])
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(row[None]), before)
    for parameter in twin.parameters():
        parameter.zero_()
    assert not twin(row[None]).any()
    assert torch.equal(ours(row[None]), before)


def test_template_is_the_one_of_qwen3(tokenizer):
    assert apply_template(tokenizer, "a red apple") == (
        "<|im_start|>user\na red apple<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokenize_cuts_the_tail_and_pads_nothing(tokenizer):
    prompt = "a red apple on a plate"
    (whole,) = tokenize(tokenizer, [prompt], 512)
    assert tokenizer.decode(whole) == apply_template(tokenizer, prompt)
    short, empty = tokenize(tokenizer, [prompt, ""], 5)
    assert short == whole[:5]
    assert 0 < len(empty) <= 5
    assert tokenize(tokenizer, [], 512) == []
    with pytest.raises(ValueError, match="max_sequence_length is 0; must be 1 or more"):
        tokenize(tokenizer, [prompt], 0)


def test_encode_prompts_equals_diffusers(tmp_path, tokenizer):
    from diffusers import ZImagePipeline

    ours, theirs = pair(tmp_path)
    prompts = ["a red apple", "", "portrait avatar of a woman with red hair and a hat " * 8]
    reference = ZImagePipeline(None, None, theirs, tokenizer, None).encode_prompt(
        list(prompts),
        device=torch.device("cpu"),
        do_classifier_free_guidance=False,
        max_sequence_length=48,
    )[0]
    encoded = encode_prompts(ours, tokenizer, prompts, 48, "cpu")
    assert [len(e) for e in encoded] == [len(r) for r in reference]
    assert len(encoded[2]) == 48
    for a, b, prompt in zip(encoded, reference, prompts, strict=True):
        assert relative(a, b) < 1e-5
        (alone,) = encode_prompts(ours, tokenizer, [prompt], 48, "cpu")
        assert relative(a, alone) < 1e-5
        assert not a.requires_grad
    assert encode_prompts(ours, tokenizer, [], 48, "cpu") == []


WORDS = ["a", "red", "apple", "portrait", "of", "an", "old", "woman", "with", "curly", "hair"]


def prompts_of(*numbers):
    """Prompts of so many words, no two alike."""
    return [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(n)) for i, n in enumerate(numbers)]


def shapes_of_batches(encoder, call):
    """What a call gives, and the shapes (B, L) of the ids that the encoder saw."""
    shapes = []
    hook = encoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        return call(), shapes
    finally:
        hook.remove()


def test_many_prompts_are_encoded_in_bounded_batches_as_if_alone(tmp_path, tokenizer):
    ours, _ = pair(tmp_path)
    numbers = torch.randint(0, 90, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = prompts_of(*numbers, 900, 1, 850)
    lengths = [len(ids) for ids in tokenize(tokenizer, prompts, 3000)]
    assert max(lengths) > 2048 // 2  # so that two of the long ones do not fit
    encoded, shapes = shapes_of_batches(
        ours, lambda: encode_prompts(ours, tokenizer, prompts, 3000, "cpu")
    )
    assert [len(features) for features in encoded] == lengths
    assert sum(size for size, _ in shapes) == len(prompts) > len(shapes)
    assert all(size == 1 or size * length <= 2048 for size, length in shapes)
    assert sum(size * length for size, length in shapes) - sum(lengths) <= 256 * len(shapes)
    for features, prompt in zip(encoded, prompts, strict=True):
        (alone,) = encode_prompts(ours, tokenizer, [prompt], 3000, "cpu")
        assert relative(features, alone) < 1e-5


def test_a_prompts_features_do_not_depend_on_the_order_of_a_call(tmp_path, tokenizer):
    ours, _ = pair(tmp_path)
    prompts = prompts_of(*range(1, 80, 2), *range(1, 80, 3))
    forward = encode_prompts(ours, tokenizer, prompts, 512, "cpu")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = encode_prompts(ours, tokenizer, [prompts[i] for i in order], 512, "cpu")
    assert all(torch.equal(found, forward[i]) for i, found in zip(order, shuffled, strict=True))


@pytest.mark.parametrize("numbers", [(0,), (5, 9, 5, 30), (25,) * 8])
def test_few_prompts_share_one_batch(tmp_path, tokenizer, numbers):
    ours, _ = pair(tmp_path)
    prompts = prompts_of(*numbers)
    _, shapes = shapes_of_batches(
        ours, lambda: encode_prompts(ours, tokenizer, prompts, 512, "cpu")
    )
    assert [size for size, _ in shapes] == [len(prompts)]


def test_real_model_is_built_without_its_last_layer():
    config = TextEncoderConfig(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        attention_bias=False,
        hidden_act="silu",
        model_type="qwen3",
    )
    with torch.device("meta"):
        model = TextEncoder(config)
    assert len(model.layers) == 35
    layer = sum(p.numel() for p in model.layers[0].parameters())
    # The published count holds all 36 layers and the final norm.
    assert sum(p.numel() for p in model.parameters()) + layer + 2560 == 4_022_468_096
