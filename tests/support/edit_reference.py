"""What the transformer of an edit computes, written down slowly: a token at a time, in float64.

From the description of the data flow alone, with none of the project's code and none of diffusers':
segments of text with images between them, positions, per-token modulation, cut out of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Token = tuple[Tensor, tuple[int, int, int], bool]
"""What it holds, its position, and whether it is noisy."""


class _Model:
    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.state = {key: value.double() for key, value in state.items()}
        self.config = config

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.state[f"{name}.weight"] @ x
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean() + eps).sqrt() * self.state[f"{name}.weight"]

    def time(self, t: float) -> Tensor:
        scaled = torch.tensor(t).float() * self.config["t_scale"]
        index = torch.arange(128, dtype=torch.float32)
        # In float32, as the angles of the model's own features are.
        angles = (scaled * torch.exp(-math.log(10000.0) * index / 128)).float()
        features = torch.cat((angles.cos(), angles.sin())).double()
        hidden = self.linear("t_embedder.mlp.0", features)
        return self.linear("t_embedder.mlp.2", hidden * hidden.sigmoid())

    def rotated(self, x: Tensor, position: tuple[int, int, int]) -> Tensor:
        out, first = x.clone(), 0
        for place, width in zip(position, self.config["axes_dims"], strict=True):
            for pair in range(0, width, 2):
                angle = place * self.config["rope_theta"] ** (-pair / width)
                a, b = x[first + pair], x[first + pair + 1]
                out[first + pair] = a * math.cos(angle) - b * math.sin(angle)
                out[first + pair + 1] = a * math.sin(angle) + b * math.cos(angle)
            first += width
        return out

    def attention(self, name: str, xs: list[Tensor], tokens: list[Token]) -> list[Tensor]:
        heads = self.config["n_heads"]
        size = self.config["dim"] // heads
        q, k, v = ([self.linear(f"{name}.to_{part}", x) for x in xs] for part in "qkv")
        mixed = [torch.zeros(0, dtype=torch.float64) for _ in xs]
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            queries, keys = (
                torch.stack(
                    [
                        self.rotated(self.norm(f"{name}.norm_{part}", y[cut], 1e-5), token[1])
                        for y, token in zip(ys, tokens, strict=True)
                    ]
                )
                for part, ys in (("q", q), ("k", k))
            )
            weights = torch.softmax(queries @ keys.T / math.sqrt(size), dim=-1)
            values = weights @ torch.stack([y[cut] for y in v])
            mixed = [torch.cat((old, new)) for old, new in zip(mixed, values, strict=True)]
        return [self.linear(f"{name}.to_out.0", y) for y in mixed]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        gate = self.linear(f"{name}.w1", x)
        return self.linear(f"{name}.w2", gate * gate.sigmoid() * self.linear(f"{name}.w3", x))

    def block(self, name: str, tokens: list[Token], times: tuple[Tensor, Tensor] | None) -> None:
        """Replace what the tokens hold; `times` are those of noisy and clean tokens."""
        eps, dim = self.config["norm_eps"], self.config["dim"]
        ones = torch.ones(dim, dtype=torch.float64)
        scales = [(ones, ones, ones, ones)] * len(tokens)
        if times is not None:
            of_time = []
            for time in times:
                parts = self.linear(f"{name}.adaLN_modulation.0", time).split(dim)
                of_time.append((1 + parts[0], parts[1].tanh(), 1 + parts[2], parts[3].tanh()))
            scales = [of_time[0] if noisy else of_time[1] for _, _, noisy in tokens]
        normed = [
            self.norm(f"{name}.attention_norm1", x, eps) * scale[0]
            for (x, _, _), scale in zip(tokens, scales, strict=True)
        ]
        mixed = self.attention(f"{name}.attention", normed, tokens)
        for i, (update, scale) in enumerate(zip(mixed, scales, strict=True)):
            x, position, noisy = tokens[i]
            x = x + scale[1] * self.norm(f"{name}.attention_norm2", update, eps)
            hidden = self.norm(f"{name}.ffn_norm1", x, eps) * scale[2]
            update = self.feed_forward(f"{name}.feed_forward", hidden)
            x = x + scale[3] * self.norm(f"{name}.ffn_norm2", update, eps)
            tokens[i] = x, position, noisy


def reference_velocity(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    text: Sequence[Tensor],
    pictures: Sequence[Tensor],
    visual: Sequence[Tensor],
    latents: Tensor,
    time: float,
) -> Tensor:
    """Velocity (F, h, w) in float64 of an image with latents (F, h, w)."""
    model = _Model(state, config)
    times = model.time(time), model.time(1.0)
    images = [*pictures, latents]
    words: list[Token] = []
    ends, place = [], 1
    for k, segment in enumerate(text):
        noisy = k >= len(pictures)
        count = -(-len(segment) // 32) * 32
        for n in range(count):
            x = model.state["cap_pad_token"][0]
            if n < len(segment):
                row = segment[n].double()
                x = model.linear(
                    "cap_embedder.1", model.norm("cap_embedder.0", row, config["norm_eps"])
                )
            words.append((x, (place + n, 0, 0), noisy))
        ends.append(place + len(segment))
        place += len(segment) + 2

    patches: list[Token] = []
    start = 0
    for j, image in enumerate(images):
        noisy = j == len(pictures)
        start = len(patches)
        _, height, width = image.shape
        for row in range(height // 2):
            for column in range(width // 2):
                cut = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                patch = cut.permute(1, 2, 0).reshape(-1).double()
                x = model.linear("all_x_embedder.2-1", patch)
                patches.append((x, (ends[j], row, column), noisy))
        while len(patches) % 32:
            patches.append((model.state["x_pad_token"][0], (0, 0, 0), noisy))

    seen: list[Token] = []
    for j, features in enumerate(visual):
        rows, columns, width = features.shape
        tokens = features.permute(2, 0, 1).reshape(rows * columns, width).double()
        for n, token in enumerate(tokens):
            row, column = divmod(n, columns)
            _, height, across = images[j].shape
            y = int(row / max(rows - 1, 1) * (height - 1))
            x = int(column / max(columns - 1, 1) * (across - 1))
            made = model.linear(
                "siglip_embedder.1", model.norm("siglip_embedder.0", token, config["norm_eps"])
            )
            seen.append((made, (ends[j] + 1, y, x), False))
        while len(seen) % 32:
            seen.append((model.state["siglip_pad_token"][0], (0, 0, 0), False))
    if visual:
        seen += [(model.state["siglip_pad_token"][0], (0, 0, 0), True)] * 32

    for i in range(config["n_refiner_layers"]):
        model.block(f"noise_refiner.{i}", patches, times)
        model.block(f"context_refiner.{i}", words, None)
        if seen:
            model.block(f"siglip_refiner.{i}", seen, None)
    stream = words + patches + seen
    for i in range(config["n_layers"]):
        model.block(f"layers.{i}", stream, times)

    _, height, width = latents.shape
    out = torch.zeros(latents.shape, dtype=torch.float64)
    final = "all_final_layer.2-1"
    silu = times[0] * times[0].sigmoid()
    scale = 1 + model.linear(f"{final}.adaLN_modulation.1", silu)
    for row in range(height // 2):
        for column in range(width // 2):
            x = stream[len(words) + start + row * (width // 2) + column][0]
            normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
            patch = model.linear(f"{final}.linear", normed * scale)
            cut = patch.reshape(2, 2, -1).permute(2, 0, 1)
            out[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = cut
    return out
