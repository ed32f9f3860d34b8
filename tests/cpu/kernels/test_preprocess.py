"""Preprocessing: the same pixels as Pillow, the same bits from kernel and reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, ShapeError
from sn72kernels.ops.preprocess import geometry, op, reference

pytest.importorskip("triton", reason="Triton is not installed")

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIDES = st.integers(1, 70)
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "dtype": torch.float32}


def make(count: int, h: int, w: int, seed: int) -> torch.Tensor:
    """Noise of the extremes and values between: filters with negative lobes overshoot."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, h, w, 3))
    extremes = rng.choice((0, 255), (count, h, w, 3))
    return torch.from_numpy(np.where(rng.random((count, h, w, 3)) < 0.5, pixels, extremes)).to(
        torch.uint8
    )


@given(
    source=st.tuples(SIDES, SIDES),
    size=st.tuples(SIDES, SIDES),
    fit=st.sampled_from(("center_crop", "squash", "pad")),
    crop_fraction=st.sampled_from((1.0, 0.875, 0.3)),
    interpolation=st.sampled_from(tuple(PILLOW)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_pixels_are_those_of_pillow(
    source: tuple[int, int],
    size: tuple[int, int],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    seed: int,
) -> None:
    images = make(1, *source, seed)
    have = sn72kernels.preprocess(
        images[0], size, fit=fit, crop_fraction=crop_fraction, interpolation=interpolation,
        **IDENTITY,
    )  # fmt: skip
    place = geometry.place(source, size, fit, crop_fraction)
    picture, (left, top, right, bottom) = Image.fromarray(images[0].numpy()), place.box
    # In two calls, since Pillow chooses the order of the passes by size from version 13 on.
    across = (left, 0, right, source[0])
    inner = picture.resize((place.width, source[0]), PILLOW[interpolation], box=across)
    down = (0, top, place.width, bottom)
    inner = inner.resize((place.width, place.height), PILLOW[interpolation], box=down)
    wanted = np.zeros((*size, 3), np.float32)
    rows = slice(place.top, place.top + place.height)
    wanted[rows, place.left : place.left + place.width] = np.asarray(inner)
    # The scale 1 / (255 std) is 1 to within a unit of float32.
    np.testing.assert_allclose(have[0].permute(1, 2, 0).numpy(), wanted, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("source", [(60, 30), (30, 60), (200, 90)])
def test_one_call_of_pillow_is_within_one_step(source: tuple[int, int]) -> None:
    """On an image without extremes; see the reference for the order of the passes."""
    grid = np.add.outer(np.sin(np.arange(source[0]) / 5), np.cos(np.arange(source[1]) / 7))
    image = (grid[..., None] * (40, 50, 60) + 128).astype(np.uint8)
    have = sn72kernels.preprocess(torch.from_numpy(image), (24, 20), fit="squash", **IDENTITY)
    wanted = np.asarray(Image.fromarray(image).resize((20, 24), Image.Resampling.BICUBIC))
    assert np.abs(have[0].permute(1, 2, 0).numpy() - wanted).max() <= 1.001


@given(
    count=st.sampled_from((0, 1, 2)),
    source=st.sampled_from(((1, 1), (5, 7), (6, 4))),
    size=st.sampled_from(((3, 4), (3, 70), (6, 6), (5, 3))),
    fit=st.sampled_from(("center_crop", "squash", "pad")),
    interpolation=st.sampled_from(tuple(PILLOW)),
    dtype=st.sampled_from(op.DTYPES),
    planar=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None)
def test_kernel_gives_the_bits_of_the_reference(
    count: int,
    source: tuple[int, int],
    size: tuple[int, int],
    fit: str,
    interpolation: str,
    dtype: torch.dtype,
    planar: bool,
    seed: int,
) -> None:
    images = make(count, *source, seed)
    if planar:
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    arguments = (images, list(size), *colours, fit, 0.9, interpolation, dtype)
    have, want = op.launch_preprocess(*arguments), reference.preprocess(*arguments)
    assert have.dtype == want.dtype
    torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_normalisation_is_the_plain_formula() -> None:
    images = make(2, 6, 6, 1)
    have = sn72kernels.preprocess(images, (6, 6), dtype=torch.float32)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    wanted = ((images.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)
    # Two roundings of numbers of size 4.4 at most.
    np.testing.assert_allclose(have.numpy(), wanted, rtol=0, atol=5 * 2.0**-23)


def test_weights_are_found_again() -> None:
    images = make(1, 9, 8, 2)
    sn72kernels.preprocess(images, (4, 4))
    before = geometry.axis_taps.cache_info().hits
    sn72kernels.preprocess(images, (4, 4))
    assert geometry.axis_taps.cache_info().hits == before + 2


class OnStream:
    """Stands for weights on a card: what keeps their memory is asked for, nothing runs."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


def test_memory_of_weights_outlives_their_place_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that reads them is noted; what a graph captured stays for good."""
    monkeypatch.setattr(geometry, "_captured", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weights = OnStream()
    geometry._keep([weights])  # type: ignore[list-item]
    assert (weights.streams, geometry._captured) == (["stream"], {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    geometry._keep([weights])  # type: ignore[list-item]
    geometry._keep([weights])  # type: ignore[list-item]
    assert list(geometry._captured.values()) == [weights]
    assert weights.streams == ["stream"]


class Model(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sn72kernels.preprocess(images, (4, 5))


def test_compile_full_graph_for_any_size_of_image() -> None:
    """The weights are computed inside the operator: a new size needs no new graph."""
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 9, 8), (3, 20, 31), (2, 64, 48)):
        with torch._dynamo.config.patch(error_on_recompile=shape[1] == 64):
            images = make(*shape, 4)
            assert torch.equal(compiled(images), sn72kernels.preprocess(images, (4, 5)))


def test_export_has_one_node_and_takes_any_size() -> None:
    torch.use_deterministic_algorithms(False)
    sizes = {place: torch.export.Dim(name) for place, name in enumerate(("n", "h", "w"))}
    shapes = {"images": sizes}
    program = torch.export.export(Model(), (make(2, 9, 8, 5),), dynamic_shapes=shapes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.sn72.preprocess.default) == 1
    other = make(3, 12, 7, 6)
    assert torch.equal(program.module()(other), sn72kernels.preprocess(other, (4, 5)))


def test_errors_name_the_argument() -> None:
    images = make(1, 9, 8, 4)
    with pytest.raises(DtypeError, match="dtype of images: expected uint8"):
        sn72kernels.preprocess(images.float(), (4, 4))
    with pytest.raises(ShapeError, match=r"shape of images: expected \(any, any, any, 3\)"):
        sn72kernels.preprocess(images.permute(0, 3, 1, 2), (4, 4))
    with pytest.raises(ShapeError, match="no pixels"):
        sn72kernels.preprocess(images[:, :0], (4, 4))
    with pytest.raises(ArgumentError, match=r"size is \(0, 4\)"):
        sn72kernels.preprocess(images, (0, 4))
    with pytest.raises(ArgumentError, match="fit is 'stretch'"):
        sn72kernels.preprocess(images, (4, 4), fit="stretch")
    with pytest.raises(ArgumentError, match=r"crop_fraction is 1\.5"):
        sn72kernels.preprocess(images, (4, 4), crop_fraction=1.5)
    with pytest.raises(ArgumentError, match="interpolation is 'area'"):
        sn72kernels.preprocess(images, (4, 4), interpolation="area")
    with pytest.raises(ArgumentError, match="std positive"):
        sn72kernels.preprocess(images, (4, 4), std=(1.0, 0.0, 1.0))
    with pytest.raises(ArgumentError, match="dtype is torch"):
        sn72kernels.preprocess(images, (4, 4), dtype=torch.int8)
