"""Encoding and decoding in bands of rows gives the numbers of one piece, in little memory."""

import copy
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from autoencoder_configs import CONFIGS, autoencoder_values, random_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zimage_core import chunked_attention, row_bands
from zimage_core.autoencoder import AttentionBlock, AutoencoderKL, Decoder, Encoder
from zimage_core.chunked_attention import attend
from zimage_core.config import AutoencoderConfig
from zimage_core.empty_module import make_empty
from zimage_core.group_moments import GroupMoments, Moments
from zimage_core.images import to_uint8
from zimage_core.loader import load_from_local_dir
from zimage_core.pipeline import ZImagePipeline
from zimage_core.row_bands import Activation, RowBands
from zimage_core.tiling import BAND_BYTES, MIN_PIXELS, disable_tiling, enable_tiling

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data/checkpoints/z-image-tiny"
PUBLISHED = ROOT / "zimage_core/published/vae.json"
MIB = 2**20


def make_vae(**changes):
    config = AutoencoderConfig(**autoencoder_values(**changes))
    vae = AutoencoderKL(config).eval().requires_grad_(False)
    vae.load_state_dict(random_state(vae.state_dict()))
    return vae


def inputs(vae, height, width, batch=2):
    """Images (batch, 3, height, width) and latents of their size, in the model's dtype."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    shape = batch, vae.config.latent_channels, height // vae.scale_factor, width // vae.scale_factor
    latents = torch.randn(shape, generator=generator)
    dtype = vae.decoder.conv_in.weight.dtype
    return images.to(dtype), latents.to(dtype)


def results(vae, images, latents):
    encoded = vae.encode(images)
    return [vae.decode(latents), encoded.mean, encoded.logvar]


def distance(tiled, whole):
    """Largest difference over the largest value, of the worst of several results."""
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(tiled, whole, strict=True)
    )


@pytest.fixture
def by_rows(monkeypatch):
    """Let `band_bytes` be the number of rows of a band; the attention takes 23 tokens for each."""
    monkeypatch.setattr(row_bands._Pass, "num_bytes", lambda self, rows: rows)
    monkeypatch.setattr(chunked_attention, "_chunk", lambda *given: 23 * given[-1].band_bytes)


# 1 is the smallest, 2 and 8 divide most heights, 3 and 7 do not, 999 is everything.
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 999])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(48, 80), (40, 16), (8, 24)])
def test_equals_one_piece(by_rows, config, size, rows):
    vae = make_vae(**CONFIGS[config]).double()
    given = inputs(vae, *size)
    whole = results(vae, *given)
    enable_tiling(vae, band_bytes=rows, min_pixels=0)
    tiled = results(vae, *given)
    assert [t.shape for t in tiled] == [t.shape for t in whole]
    assert distance(tiled, whole) < 1e-10


@pytest.mark.parametrize("band_bytes", [1, 20_000, 150_000, 10**9])
@pytest.mark.parametrize("store", ["cpu", "device"])
def test_equals_one_piece_in_float32(band_bytes, store):
    vae = make_vae()
    given = inputs(vae, 56, 72)
    whole = results(vae, *given)
    enable_tiling(vae, band_bytes=band_bytes, store=store, min_pixels=0)
    assert distance(results(vae, *given), whole) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_fewer_bits_it_is_as_near_to_float64_as_one_piece_is(dtype):
    vae = make_vae().to(dtype)
    given = inputs(vae, 96, 64)
    whole = results(vae, *given)
    enable_tiling(vae, band_bytes=50_000, min_pixels=0)
    tiled = results(vae, *given)
    assert {t.dtype for t in tiled} == {dtype}
    disable_tiling(vae)
    exact = results(vae.double(), *(t.double() for t in given))
    for a, b, reference in zip(tiled, whole, exact, strict=True):
        assert (a - reference).norm() < 1.1 * (b - reference).norm()


def test_differs_where_each_band_has_statistics_of_its_own(by_rows, monkeypatch):
    """What makes the seams of the usual tiling: this file would notice it."""

    def normalise(self, x, norm):
        whole_band = x if x.ndim == 4 else x.mT[None]
        normed = F.group_norm(whole_band, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return normed if x.ndim == 4 else normed[0].mT

    monkeypatch.setattr(Moments, "normalise", normalise)
    vae = make_vae().double()
    given = inputs(vae, 48, 80)
    whole = results(vae, *given)
    enable_tiling(vae, band_bytes=999, min_pixels=0)
    assert distance(results(vae, *given), whole) < 1e-10  # one band is the whole image
    enable_tiling(vae, band_bytes=4, min_pixels=0)
    assert distance(results(vae, *given), whole) > 0.05


def test_differs_where_bands_are_padded_with_zeros(by_rows, monkeypatch):
    convolve = row_bands._convolve

    def zeros_between(x, conv, *, above, below):
        x = x.clone()
        x[:, :, : int(not above)] = 0
        x[:, :, x.shape[2] - int(not below) :] = 0
        return convolve(x, conv, above=above, below=below)

    monkeypatch.setattr(row_bands, "_convolve", zeros_between)
    vae = make_vae().double()
    given = inputs(vae, 48, 80)
    whole = results(vae, *given)
    enable_tiling(vae, band_bytes=4, min_pixels=0)
    assert distance(results(vae, *given), whole) > 0.05


def test_moments_keep_their_digits_where_the_mean_is_large():
    values = torch.randn(37, 11, 8, generator=torch.Generator().manual_seed(0)) + 3e3
    values[20:] += 3.0  # bands that differ
    gathered = GroupMoments(groups=2)
    for band in torch.split(values, [1, 16, 15, 5]):
        gathered.add(band)
    moments = gathered.merged(8)
    groups = values.double().view(-1, 2, 4)
    variance, mean = torch.var_mean(groups, (0, 2), correction=0)
    assert torch.allclose(moments.mean.double(), mean.repeat_interleave(4), rtol=1e-6)
    assert torch.allclose(moments.variance.double(), variance.repeat_interleave(4), rtol=3e-4)
    squares, means = (values.view(-1, 2, 4) ** 2).mean((0, 2)), values.view(-1, 2, 4).mean((0, 2))
    assert not torch.allclose((squares - means**2).double(), variance, rtol=1e-1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 999])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_in_chunks_equals_attention(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(chunked_attention, "_chunk", lambda *_: chunk)
    block = AttentionBlock(16, groups=4).to(dtype).requires_grad_(False)
    block.to_q.weight *= 40.0  # one key has most of the weight, and the maximum moves
    x = torch.randn(1, 16, 9, 13, generator=torch.Generator().manual_seed(0), dtype=dtype)
    bands = RowBands(4, 1, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    gathered = GroupMoments(4)
    rows = x[0].permute(1, 2, 0).contiguous()
    gathered.add(rows)
    result = attend(block, Activation(rows, gathered.merged(16)), bands)
    expected = block(x)
    assert distance([result.rows.permute(2, 0, 1)[None]], [expected]) < tolerance
    after = GroupMoments(4)
    after.add(expected[0].permute(1, 2, 0))
    assert distance([result.moments.variance], [after.merged(16).variance]) < tolerance


def test_small_images_are_computed_in_one_piece():
    vae = make_vae()
    images, latents = inputs(vae, 32, 48)
    whole = results(vae, images, latents)
    allocated = []

    def store(shape, dtype):
        allocated.append(shape)
        return torch.empty(shape, dtype=dtype)

    enable_tiling(vae, store=store, min_pixels=32 * 48)
    assert all(map(torch.equal, results(vae, images, latents), whole))
    assert not allocated
    enable_tiling(vae, store=store, min_pixels=32 * 48 - 1)
    vae.decode(latents)
    assert allocated
    allocated.clear()
    vae.encode(images)
    assert allocated


def test_default_leaves_a_megapixel_alone():
    assert MIN_PIXELS == 1024 * 1024


def test_a_batch_is_its_images_one_by_one():
    vae = make_vae()
    images, latents = inputs(vae, 40, 56, batch=3)
    enable_tiling(vae, band_bytes=30_000, min_pixels=0)
    batch = results(vae, images, latents)
    for i in range(3):
        one = results(vae, images[i : i + 1], latents[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(batch, one, strict=True))


def test_is_undone_without_a_trace():
    vae = make_vae()
    given = inputs(vae, 32, 32)
    whole, keys = results(vae, *given), list(vae.state_dict())
    enable_tiling(vae, band_bytes=1, min_pixels=0)
    assert list(vae.state_dict()) == keys
    assert isinstance(vae.decoder, Decoder)
    duplicate = copy.deepcopy(vae)
    duplicate.decoder.conv_out.bias += 1.0
    assert distance([duplicate.decode(given[1])], [vae.decode(given[1]) + 1.0]) < 1e-6
    assert not torch.equal(vae.decode(given[1]), whole[0])
    disable_tiling(vae)
    disable_tiling(vae)
    assert (type(vae.encoder), type(vae.decoder)) == (Encoder, Decoder)
    assert all(map(torch.equal, results(vae, *given), whole))


def test_weights_are_looked_for_when_they_are_used():
    filled = make_vae()
    vae = make_empty(AutoencoderKL, filled.config).requires_grad_(False)
    enable_tiling(vae, band_bytes=20_000, min_pixels=0)
    vae.load_state_dict(filled.state_dict(), assign=True)
    given = inputs(filled, 32, 48)
    assert distance(results(vae, *given), results(filled, *given)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"band_bytes": 0}, "band_bytes: 0 must be at least 1"),
        ({"min_pixels": -1}, "min_pixels: -1 must be at least 0"),
        ({"store": "disk"}, "store: 'disk'; allowed: 'cpu', 'device', another torch device"),
        ({"store": None}, "store: None; allowed"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    vae = make_vae()
    with pytest.raises(ValueError, match=message):
        enable_tiling(vae, **settings)
    assert type(vae.decoder) is Decoder


def test_gradients_are_refused():
    vae = make_vae().requires_grad_(True)
    images, latents = inputs(vae, 16, 16)
    enable_tiling(vae, min_pixels=0)
    for function, given in ((vae.decode, latents), (vae.encode, images)):
        with pytest.raises(ValueError, match=r"use torch\.no_grad\(\), or disable_tiling"):
            function(given)
        with torch.no_grad():
            function(given)


def test_wrong_shapes_are_refused_as_before():
    vae = make_vae()
    enable_tiling(vae, min_pixels=0)
    with pytest.raises(ValueError, match="20x32 pixels; both sides must be multiples of 8"):
        vae.encode(torch.zeros(1, 3, 32, 20))
    with pytest.raises(ValueError, match=r"allowed: \(B, 4, h, w\)"):
        vae.decode(torch.zeros(4, 8, 8))


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors that operators made and that are still there; those of the store apart."""

    def __init__(self, *given):
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._sizes = {}
        self._is_store = False
        self.live = {False: 0, True: 0}
        self.peak = {False: 0, True: 0}

    @property
    def device_peak(self):
        return self.peak[False]

    @property
    def store_peak(self):
        return self.peak[True]

    def store(self, shape, dtype):
        self._is_store = True
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self._is_store = False
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), self._is_store)
        return result

    def _count(self, storage, kind):
        identity = storage._cdata
        if identity in self._sizes or identity in self._given:
            return
        self._sizes[identity] = storage.nbytes()
        self.live[kind] += storage.nbytes()
        self.peak[kind] = max(self.peak[kind], self.live[kind])
        weakref.finalize(storage, self._forget, identity, kind)

    def _forget(self, identity, kind):
        self.live[kind] -= self._sizes.pop(identity)


def measured(vae, function, given, band_bytes):
    """Peaks of a call: beside its input, its weights and its result; None measures one piece."""
    memory = LiveMemory(given, *vae.parameters())
    memory.device = given.device
    if band_bytes is None:
        disable_tiling(vae)
    else:
        enable_tiling(vae, band_bytes=band_bytes, store=memory.store, min_pixels=0)
    with memory:
        result = function(given)
    # The mean is half of what the encoder returns.
    size = result.nbytes if isinstance(result, torch.Tensor) else 2 * result.mean.nbytes
    return memory.device_peak - size, memory.store_peak


def published_vae(dtype):
    config = AutoencoderConfig.from_json(PUBLISHED)
    return make_empty(AutoencoderKL, config).to(dtype).requires_grad_(False)


def given_for(vae, stage, height, width, device):
    dtype = vae.decoder.conv_in.weight.dtype
    if stage == "encode":
        return torch.zeros(1, 3, height, width, dtype=dtype, device=device)
    shape = 1, vae.config.latent_channels, height // vae.scale_factor, width // vae.scale_factor
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["decode", "encode"])
def test_memory_of_the_published_model_is_that_of_a_band(dtype, stage):
    """On the meta device, where the model of large images costs nothing."""
    vae = published_vae(dtype)
    function = getattr(vae, stage)
    channels = {"decode": 448, "encode": 288}[stage]  # of the store, at the image's resolution
    # The attention, whose scores would be 1 GiB at 1024 x 1024, is in it.
    for height, width, band_bytes in ((768, 512, BAND_BYTES // 4), (1024, 1024, BAND_BYTES)):
        given = given_for(vae, stage, height, width, "meta")
        device, store = measured(vae, function, given, band_bytes)
        assert 0.9 * band_bytes < device < band_bytes + MIB
        assert store == channels * height * width * dtype.itemsize
    given = given_for(vae, stage, 1024, 1024, "meta")
    one_piece, nothing = measured(vae, function, given, None)
    assert one_piece > 24 * BAND_BYTES
    assert nothing == 0


@pytest.mark.parametrize("stage", ["decode", "encode"])
def test_memory_does_not_grow_with_the_height(stage):
    vae = make_vae(block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
    function = getattr(vae, stage)
    peaks, pieces = [], []
    for height in (96, 384):
        given = given_for(vae, stage, height, 64, "cpu")
        peaks.append(measured(vae, function, given, 400_000)[0])
        pieces.append(measured(vae, function, given, None)[0])
    assert max(peaks) < 1.05 * min(peaks)
    assert max(peaks) < 420_000
    assert pieces[1] > 3.9 * pieces[0] > 3.9 * 4 * peaks[0]


def trained(dtype, latents_size):
    """The shipped checkpoint and latents of an avatar, as the pipeline has them."""
    components = load_from_local_dir(TINY, device="cpu", dtype=dtype)
    pipeline = ZImagePipeline(**components)
    prompt = "woman with curly pink hair, sunglasses, park"
    return pipeline, pipeline.denoise(
        pipeline.encode([prompt]),
        height=latents_size[0],
        width=latents_size[1],
        generators=[torch.Generator().manual_seed(3)],
    )


def test_the_pipeline_decodes_and_encodes_through_it():
    pipeline, latents = trained(torch.float32, (128, 192))
    whole = pipeline.decode(latents)
    start = pipeline.encode_image(whole, [torch.Generator().manual_seed(0)])
    enable_tiling(pipeline.vae, band_bytes=500_000, min_pixels=0)
    tiled = pipeline.decode(latents)
    assert whole.std() > 0.1
    assert (tiled - whole).abs().max() < 2e-5
    levels = to_uint8(tiled).astype(int) - to_uint8(whole)
    assert abs(levels).max() <= 1
    assert (levels != 0).mean() < 1e-3
    again = pipeline.encode_image(whole, [torch.Generator().manual_seed(0)])
    assert distance([again], [start]) < 1e-5


def test_has_no_seams_where_tiles_of_their_own_statistics_have():
    pipeline, latents = trained(torch.float32, (256, 192))
    scaled = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    whole = pipeline.vae.decode(scaled)
    enable_tiling(pipeline.vae, band_bytes=500_000, min_pixels=0)
    ours = (pipeline.vae.decode(scaled) - whole).abs().max()
    theirs = diffusers.AutoencoderKL.from_pretrained(TINY / "vae").eval()
    theirs.requires_grad_(False)
    assert (theirs.decode(scaled).sample - whole).abs().max() < 1e-4
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 128, 16
    assert (theirs.decode(scaled).sample - whole).abs().max() > 1000 * ours
