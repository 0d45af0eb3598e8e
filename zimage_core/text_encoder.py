"""Text encoder: Qwen3 up to its last layer but one, and the way from prompts to its features.

Z-Image conditions on `hidden_states[-2]` of Qwen3: what the last layer but one gives, before the
final norm. So the last layer, the final norm and the language head do not exist here: they are
neither loaded nor run. Attribute names are the keys of transformers' `Qwen3Model`.

Shapes: B prompts, L tokens of the longest, D hidden size, H heads, E channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.config import CheckpointError, TextEncoderConfig, read_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKENIZER_SETTINGS = (
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


class TextEncoder(nn.Module):
    """Causal Qwen3 transformer without its last layer.

    Args:
        config: architecture of the whole model, as `text_encoder/config.json` gives it; one layer
            less is built.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_hidden_layers - 1)
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the features."""
        return self.embed_tokens.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the features of tokens.

        Args:
            input_ids: (B, L) int64, shorter prompts padded on the right. Attention is causal, so
                a real token sees no padding with or without a mask.
            attention_mask: (B, L), not zero where a token is real. Features of real tokens are the
                same without it, and faster to compute.

        Returns:
            (B, L, D) in the model's dtype; rows of padding hold nothing of use.
        """
        x: Tensor = self.embed_tokens(input_ids)
        rope = _rope_table(
            input_ids.shape[1], self.config.head_dim, self.config.rope_theta, x.device
        ).to(x.dtype)
        mask = None if attention_mask is None else _causal_mask(attention_mask)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return x


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each on a normed copy of the stream and added to it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) to the same shape; `rope` is (2, L, E), `mask` (B, 1, L, L) or None."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Attention(nn.Module):
    """Causal attention; several query heads share a key head, queries and keys are normed."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) to the same shape; `rope` is (2, L, E), `mask` (B, 1, L, L) or None."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), rope)
        k = _rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), rope)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        # Repeated by hand: `enable_gqa` would leave some devices without a fused kernel.
        k = k.repeat_interleave(self.queries_per_key, dim=1)
        v = v.repeat_interleave(self.queries_per_key, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def full_model_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of `Qwen3Model`, the last layer and the final norm included."""
    with torch.device("meta"):
        layer = DecoderLayer(config).state_dict()
    return {
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        **{
            f"layers.{i}.{key}": tuple(tensor.shape)
            for i in range(config.num_hidden_layers)
            for key, tensor in layer.items()
        },
        "norm.weight": (config.hidden_size,),
    }


def load_tokenizer(folder: Path) -> Any:
    """Load `tokenizer.json` and what `tokenizer_config.json` says about it.

    The class that the configuration names is not looked up: `Qwen2Tokenizer` of transformers 4 and
    5 build differently, while the file itself holds the whole tokenizer.

    Args:
        folder: `tokenizer/` of a checkpoint.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: a file is missing or cannot be read, or there is no chat template.
    """
    # Imported here: transformers costs most of a second, and not every user of this module loads.
    from transformers import PreTrainedTokenizerFast

    config_path, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = read_json(config_path)
    template_path = folder / "chat_template.jinja"
    template = config.get("chat_template")
    if template_path.is_file():  # where transformers 5 saves it
        template = template_path.read_text(encoding="utf-8")
    if not isinstance(template, str):
        raise CheckpointError(f"{config_path}: chat_template is {template!r}; allowed: a template")
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing")
    settings = {key: config[key] for key in _TOKENIZER_SETTINGS if config.get(key) is not None}
    tokens = {key: _token(config[key]) for key in _SPECIAL_TOKENS if config.get(key) is not None}
    try:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path), chat_template=template, **settings, **tokens
        )
    except Exception as error:  # the tokenizers library raises Exception itself
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error


def apply_template(tokenizer: Any, prompt: str) -> str:
    """Wrap a prompt in the chat template as Z-Image was trained with it.

    The prompt is the user's turn, the assistant's turn is opened, and thinking is enabled, which
    in Qwen3's template means that no empty thought is put in the assistant's mouth.
    """
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    return text


def tokenize(tokenizer: Any, prompts: Sequence[str], max_sequence_length: int) -> list[list[int]]:
    """Turn prompts into token ids, template included, without padding.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        prompts: any number, also none.
        max_sequence_length: ids that are kept; what is cut off is the end, so that a prompt that
            is too long loses the end of the template too, as in diffusers.

    Raises:
        ValueError: `max_sequence_length` is less than 1.
    """
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length is {max_sequence_length}; must be 1 or more")
    if not prompts:
        return []
    texts = [apply_template(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, padding=False, truncation=True, max_length=max_sequence_length)
    return [list(ids) for ids in encoded["input_ids"]]


@torch.no_grad()
def encode_prompts(
    text_encoder: TextEncoder,
    tokenizer: Any,
    prompts: Sequence[str],
    max_sequence_length: int,
    device: torch.device | str,
) -> list[Tensor]:
    """Encode prompts in one batch, each to what it gives when it is encoded alone.

    Args:
        text_encoder: on the device where it shall run.
        tokenizer: see `tokenize`.
        prompts: any number, also none.
        max_sequence_length: see `tokenize`.
        device: where the results go.

    Returns:
        For each prompt (L_i, D), L_i its own number of tokens, in the encoder's dtype.

    Raises:
        ValueError: `max_sequence_length` is less than 1.
    """
    ids = tokenize(tokenizer, prompts, max_sequence_length)
    if not ids:
        return []
    longest = max(map(len, ids))
    # Which id stands for padding is of no matter: causal attention never looks to the right.
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    features = text_encoder(padded.to(text_encoder.device))
    # Copies, so that one prompt's features do not keep the whole batch in memory.
    return [row[: len(own)].to(device, copy=True) for row, own in zip(features, ids, strict=True)]


def _causal_mask(attention_mask: Tensor) -> Tensor:
    """(B, L), true where real, to (B, 1, L, L), true where row may look at column."""
    length = attention_mask.shape[1]
    device = attention_mask.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # A token sees itself even where it is padding: a row without any key would give NaN.
    itself = torch.eye(length, dtype=torch.bool, device=device)
    mask: Tensor = causal & (attention_mask[:, None, None, :].bool() | itself)
    return mask


def _rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines, (2, L, E) float32, for positions 0 to L - 1."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    inverse_frequencies = torch.pow(theta, channels / head_dim).reciprocal()
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel i of (B, H, L, E) with channel i + E / 2, by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    rotated: Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated


def _token(value: Any) -> str:
    """A special token as the file gives it: its text, or an object with the text as `content`."""
    return str(value["content"] if isinstance(value, dict) else value)
