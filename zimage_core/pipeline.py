"""Text, an image to start from or pictures to edit, to image: encode, denoise, decode pixels.

`ZImagePipeline` has the stages as methods, so that a caller can run each where and when it likes;
`zimage_core.generation` runs all of them for a list of prompts.

Letters in shapes: B images, F channels of latents, h and w latents' height and width, H and W the
image's, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from zimage_core import images as pixels
from zimage_core.chat_template import edit_segments
from zimage_core.entries import Condition, make_entries
from zimage_core.guidance import Guidance
from zimage_core.inpainting import KeptImage, check_inpainting
from zimage_core.noise import check_shape, noise_or_given
from zimage_core.offload import compute_device, use
from zimage_core.patchify import patchify, unpatchify
from zimage_core.pictures import (
    EncodedPicture,
    check_vision,
    picture_latents,
    prepare_picture,
    sample_latents,
)
from zimage_core.step_cache import StepCache, computed_steps
from zimage_core.strength import first_step
from zimage_core.text_encoder import encode_ids, encode_prompts, tokenize, tokenize_texts
from zimage_core.transfer import to_device

if TYPE_CHECKING:
    from zimage_core.autoencoder import AutoencoderKL
    from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
    from zimage_core.text_encoder import TextEncoder
    from zimage_core.transformer import ZImageTransformer2DModel
    from zimage_core.vision import VisionEncoder, VisionProcessor


class ZImagePipeline:
    """The components of a checkpoint and the stages of making images with them.

    Takes what `load_from_local_dir` returns: `ZImagePipeline(**load_from_local_dir(...))`. Holds no
    state of a run; components are never changed.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        tokenizer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        siglip: VisionEncoder | None = None,
        siglip_processor: VisionProcessor | None = None,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.siglip = siglip
        self.siglip_processor = siglip_processor

    @property
    def device(self) -> torch.device:
        """Where latents are denoised."""
        return compute_device(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the transformer computes; latents themselves are float32."""
        return self.transformer.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for each element of its latents, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Number that height and width must be multiples of."""
        return self.vae_scale_factor * self.transformer.patch_size

    def caption_lengths(self, prompts: Sequence[str], max_sequence_length: int = 512) -> list[int]:
        """Count the tokens of prompts, template included, after truncation; runs no model.

        Raises:
            ValueError: `max_sequence_length` is less than 1.
        """
        _check_max_sequence_length(max_sequence_length)
        return [len(ids) for ids in tokenize(self.tokenizer, list(prompts), max_sequence_length)]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, max_sequence_length: int = 512) -> list[Tensor]:
        """Encode prompts to text features, each as if it were encoded alone.

        Args:
            prompts: one for each caption; equal prompts are encoded once.
            max_sequence_length: tokens that a prompt is cut to, template included.

        Returns:
            For each prompt (L_i, cap_feat_dim); equal prompts share one tensor.

        Raises:
            ValueError: `max_sequence_length` is less than 1.
        """
        _check_max_sequence_length(max_sequence_length)
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return []
        use(self.text_encoder)
        encoded = encode_prompts(
            self.text_encoder,
            self.tokenizer,
            unique,
            max_sequence_length,
            self.text_encoder.device,
        )
        of_prompt = dict(zip(unique, encoded, strict=True))
        return [of_prompt[prompt] for prompt in prompts]

    @torch.no_grad()
    def encode_image(
        self, images: Tensor, generators: Generator | Sequence[Generator] | None = None
    ) -> Tensor:
        """Encode starting images to latents, drawn from the Gaussian that the autoencoder gives.

        The draw is the first from each generator; `denoise` draws the noise after it. Images are
        encoded one at a time, so that latents do not depend on their neighbours and no more
        memory is needed for many.

        Args:
            images: (N, 3, H, W) in [0, 1], as `images.from_input` returns them.
            generators: one for each of the latents: N, or k * N where k neighbours share an image;
                or a single one that draws for all N at once; None is torch's default CPU generator.

        Returns:
            (N, F, h, w) or (k * N, F, h, w) float32 on the pipeline's device.

        Raises:
            ValueError: the number of generators is no multiple of N, or H or W is not a multiple of
                `vae_scale_factor`.
        """
        use(self.vae)
        return sample_latents(self.vae, images, generators).to(self.device)

    @property
    def takes_pictures(self) -> bool:
        """Whether the checkpoint is one that edits pictures."""
        return self.transformer.config.siglip_feat_dim is not None

    @torch.no_grad()
    def encode_edit_text(
        self, prompt: str, num_pictures: int, *, max_sequence_length: int = 512
    ) -> list[Tensor]:
        """Encode the text of an edit, cut where its pictures stand, each segment by itself.

        Args:
            prompt: what is asked for.
            num_pictures: of how many pictures; with none it is cut nowhere.
            max_sequence_length: tokens that each segment is cut to.

        Returns:
            `num_pictures` + 2 segments, or 1, (L_k, cap_feat_dim) each: `Edit.text`.

        Raises:
            ValueError: `max_sequence_length` is less than 1.
        """
        segments = edit_segments(prompt, num_pictures)
        ids = tokenize_texts(self.tokenizer, segments, max_sequence_length)
        use(self.text_encoder)
        return encode_ids(self.text_encoder, ids, self.text_encoder.device)

    @torch.no_grad()
    def encode_pictures(
        self, pictures: Sequence[Any], *, area: int | None = None
    ) -> list[EncodedPicture]:
        """Encode pictures, each by itself: what they are made of, and what is seen in them.

        Args:
            pictures: each as `prepare_picture` takes or returns it.
            area: see `prepare_picture`.

        Raises:
            ValueError: the checkpoint takes no pictures; and see `prepare_picture`.
        """
        check_vision(self.takes_pictures, self.siglip, self.siglip_processor)
        assert self.siglip is not None and self.siglip_processor is not None
        multiple, device = self.size_multiple, self.device
        prepared = [prepare_picture(p, multiple=multiple, area=area) for p in pictures]
        use(self.siglip)
        visual = [self.siglip(self.siglip_processor(p.seen)).to(device) for p in prepared]
        use(self.vae)
        latents = [picture_latents(self.vae, p.cropped).to(device) for p in prepared]
        return [EncodedPicture(*parts) for parts in zip(latents, visual, strict=True)]

    @torch.no_grad()
    def denoise(
        self,
        prompt_embeds: Sequence[Condition],
        *,
        height: int,
        width: int,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        negative_prompt_embeds: Sequence[Condition] | None = None,
        generators: Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        image_latents: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 0.6,
        cfg_normalization: bool | float = False,
        cfg_truncation: float | None = 1.0,
        cache: int | None = None,
        aligned_positions: bool = True,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Denoise one image for each text feature, from noise or from a noised image.

        Images are grouped by the padded length of their captions, so no attention is ever masked
        and an image does not depend on its neighbours.

        Args:
            prompt_embeds: B text features as `encode` returns them, or B edits.
            height: H in pixels.
            width: W in pixels.
            num_inference_steps: number of transformer evaluations; with `image_latents` fewer are
                made, see `strength.first_step`, and fewer with `cache`.
            guidance_scale: see `Guidance.scale`; 0 runs no negative branch.
            negative_prompt_embeds: B text features or edits, required where `guidance_scale` > 0.
            generators: B generators, one for the noise of each image (on the CPU, a seed means the
                same noise for every device).
            latents: noise (B, F, h, w) instead of `generators`.
            image_latents: images to start from, (B, F, h, w) as `encode_image` returns them; None
                starts from noise alone.
            mask: (B, 1, h, w) bool, True where `image_latents` are made anew; elsewhere they are
                put back after each step, see `inpainting`. None makes all anew.
            strength: of the change to `image_latents`, above 0 and at most 1; without meaning
                where there are none.
            cfg_normalization: see `Guidance.normalization`.
            cfg_truncation: see `Guidance.truncation`.
            cache: None evaluates the transformer on each step; a number of `step_cache.INTERVALS`
                on one step of so many in the middle of the schedule, which is lossy.
            aligned_positions: of edits, see `edit_layout`; without meaning for other checkpoints.
            on_step: called with the index of each step, in the whole schedule, once it is queued.

        Returns:
            (B, F, h, w) float32 on the pipeline's device.

        Raises:
            ValueError: an argument is out of range, lists differ in length, or the checkpoint takes
                no edits.
        """
        num_images = len(prompt_embeds)
        if num_images == 0:
            raise ValueError("prompt_embeds: at least one is needed")
        shape = self.latents_shape(num_images, height, width)
        guidance = Guidance(
            scale=guidance_scale, normalization=cfg_normalization, truncation=cfg_truncation
        )
        negatives = guidance.negatives(negative_prompt_embeds, num_images)

        h, w = shape[-2:]
        patch_size = self.transformer.patch_size
        image_seq_len = (h // patch_size) * (w // patch_size)
        sigmas = self.scheduler.sigmas(num_inference_steps, image_seq_len=image_seq_len)
        times = self.scheduler.model_times(sigmas)
        first = 0 if image_latents is None else first_step(num_inference_steps, strength)
        steps = range(first, num_inference_steps)
        is_guided = {i: guidance.acts_at(times[i].item()) for i in steps}
        if mask is not None:
            check_inpainting(has_image=image_latents is not None, cache=cache)
        computed = computed_steps(list(is_guided.values()), cache)
        velocities = StepCache(computed, times[first:].tolist())

        use(self.transformer)
        noise = noise_or_given(shape, generators, latents)
        latents = to_device(noise.float(), self.device)
        kept = None
        if image_latents is not None:
            check_shape("image_latents", image_latents, shape)
            image_latents = image_latents.to(self.device, torch.float32)
            if mask is not None:
                kept = KeptImage(mask, image_latents, latents, self.scheduler, sigmas, patch_size)
            latents = self.scheduler.scale_noise(image_latents, latents, sigmas, first)

        conditions: list[Condition] = [*prompt_embeds, *negatives]
        entries = make_entries(
            self.transformer, conditions, num_images, h, w, aligned=aligned_positions
        )
        plain = both = None
        if not all(is_guided.values()):
            plain = entries(num_images)
        if any(is_guided.values()):
            both = entries(2 * num_images)

        modulations = self.transformer.modulations(times)
        # Patches are but another order of the same numbers, and stay in it until the end.
        patches = patchify(latents, patch_size)
        for i in steps:
            evaluated = both if is_guided[i] else plain
            assert evaluated is not None
            evaluate = partial(evaluated.velocity, patches, modulations[i])
            velocity = velocities.velocity(i - first, evaluate)
            if is_guided[i]:
                velocity = guidance.combine(*velocity.chunk(2))
            # The model predicts image - noise; the scheduler walks along sigma, from noise.
            patches = self.scheduler.step(-velocity, patches, sigmas, i)
            if kept is not None:
                patches = kept.restore(patches, i + 1)
            if on_step is not None:
                on_step(i)
        return unpatchify(patches, patch_size, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, F, h, w) to images (B, 3, H, W), float32 in [0, 1].

        One image after the other: its pixels are those that it has alone, to the last bit, and the
        activations, which at 1024 x 1024 pixels are gigabytes an image, those of one. In batches
        of 8 a CPU takes 1.3 to 1.9 times as long, its caches hold less of each.
        """
        use(self.vae)
        config = self.vae.config
        weight = next(self.vae.parameters())
        scaled = latents.float() / config.scaling_factor + config.shift_factor
        each = torch.split(scaled.to(weight.device, weight.dtype), 1)
        return torch.cat([pixels.from_signed(self.vae.decode(image)) for image in each])

    def latents_shape(self, num_images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (B, F, h, w) of the latents of images of a size.

        Raises:
            ValueError: height or width is not a multiple of `size_multiple`.
        """
        for name, value in (("height", height), ("width", width)):
            pixels.check_side(name, value, self.size_multiple)
        factor = self.vae_scale_factor
        return num_images, self.transformer.in_channels, height // factor, width // factor


def _check_max_sequence_length(max_sequence_length: int) -> None:
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length: {max_sequence_length} must be at least 1")
