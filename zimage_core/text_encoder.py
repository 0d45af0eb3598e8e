"""Text encoder: Qwen3 up to its last layer but one, and the way from prompts to its features.

Z-Image conditions on `hidden_states[-2]` of Qwen3: what the last layer but one gives, before the
final norm. So the last layer, the final norm and the language head do not exist here: they are
neither loaded nor run. Attribute names are the keys of transformers' `Qwen3Model`.

Shapes: B prompts, L tokens of the longest, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.chat_template import VISION_END, VISION_START, check_template
from zimage_core.config import (
    MAX_JSON_BYTES,
    CheckpointError,
    TextEncoderConfig,
    read_json,
    shown,
)
from zimage_core.qwen3 import DecoderLayer, causal_mask, rotary_table
from zimage_core.transfer import to_device

# Of a batch, padding included: a GPU is busy with fewer, and of the published encoder's MLP so many
# keep 114 MiB in 16 bits.
MAX_BATCH_TOKENS = 2048
# Of a batch: reading the weights once more takes a GPU about as long as computing so many tokens.
MAX_PADDING_TOKENS = 256

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
        config = self.config
        x: Tensor = self.embed_tokens(input_ids)
        rotary = rotary_table(input_ids.shape[1], config.head_dim, config.rope_theta, x.device)
        mask = None if attention_mask is None else causal_mask(attention_mask)
        for layer in self.layers:
            x = layer(x, rotary.to(x.dtype), mask)
        return x


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


def text_encoder_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of `TextEncoder`, found without building one."""
    unused = ("norm.weight", f"layers.{config.num_hidden_layers - 1}.")
    return {
        key: shape for key, shape in full_model_shapes(config).items() if not key.startswith(unused)
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
    template = check_template(folder, config)
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: over {MAX_JSON_BYTES:,} bytes, which is the most allowed")
    settings = {key: config[key] for key in _TOKENIZER_SETTINGS if config.get(key) is not None}
    tokens = {
        key: _token(config_path, key, config[key])
        for key in _SPECIAL_TOKENS
        if config.get(key) is not None
    }
    try:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path), chat_template=template, **settings, **tokens
        )
    except BaseException as error:
        # The tokenizers library raises Exception itself, and BaseException where its Rust panics.
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error


def check_edit_tokens(tokenizer: Any, path: Path) -> None:
    """See that a tokenizer has the marks around pictures, each as one token.

    Raises:
        CheckpointError: one is missing; `path` names the file.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in (VISION_START, VISION_END) if token not in known]
    if missing:
        raise CheckpointError(
            f"{path}: lacks {' and '.join(missing)}, between which pictures stand, but "
            "the transformer's siglip_feat_dim asks for pictures"
        )


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
    texts = [apply_template(tokenizer, prompt) for prompt in prompts]
    return tokenize_texts(tokenizer, texts, max_sequence_length)


def tokenize_texts(
    tokenizer: Any, texts: Sequence[str], max_sequence_length: int
) -> list[list[int]]:
    """Turn texts into token ids as they are; see `tokenize`.

    Raises:
        ValueError: `max_sequence_length` is less than 1.
    """
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length is {max_sequence_length}; must be 1 or more")
    if not texts:
        return []
    encoded = tokenizer(list(texts), padding=False, truncation=True, max_length=max_sequence_length)
    return [list(ids) for ids in encoded["input_ids"]]


def encode_prompts(
    text_encoder: TextEncoder,
    tokenizer: Any,
    prompts: Sequence[str],
    max_sequence_length: int,
    device: torch.device | str,
) -> list[Tensor]:
    """Encode prompts in batches of similar lengths, each to what it gives when it is encoded alone.

    What shares a batch depends on the tokens of all prompts and not on their order.

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
    return encode_ids(text_encoder, tokenize(tokenizer, prompts, max_sequence_length), device)


@torch.no_grad()
def encode_ids(
    text_encoder: TextEncoder, ids: Sequence[list[int]], device: torch.device | str
) -> list[Tensor]:
    """Encode token ids; see `encode_prompts`."""
    encoded: dict[int, Tensor] = {}
    for batch in _batches(ids):
        longest = len(ids[batch[-1]])
        # Which id stands for padding is of no matter: causal attention never looks to the right.
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in batch])
        features = text_encoder(to_device(padded, text_encoder.device))
        for i, row in zip(batch, features, strict=True):
            # A copy, so that one prompt's features do not keep the whole batch in memory.
            encoded[i] = row[: len(ids[i])].to(device, copy=True)
    return [encoded[i] for i in range(len(ids))]


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Positions of prompts that are encoded together, the shorter ones first.

    So the memory that a batch takes is bounded, and few of its tokens are padding.
    """
    batch: list[int] = []
    real = 0  # tokens of the batch that are no padding
    for i in sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i])):
        length = len(ids[i])
        padded = (len(batch) + 1) * length
        if batch and (padded > MAX_BATCH_TOKENS or padded - real - length > MAX_PADDING_TOKENS):
            yield batch
            batch, real = [], 0
        batch.append(i)
        real += length
    if batch:
        yield batch


def _token(path: Path, key: str, value: Any) -> str:
    """A special token as the file gives it: its text, or an object with the text as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; allowed: a token as text")
    return text
