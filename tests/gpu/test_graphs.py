"""Captures on a card: what they cost, and that one which fails leaves the process as it was."""

from __future__ import annotations

import pytest
import torch

from sn72engine.cuda.driver import driver_available
from sn72engine.errors import CudaUnavailableError
from sn72engine.graphs import GraphStore, TorchCapturer

pytestmark = pytest.mark.gpu


class Nodes:
    """A driver that is asked for nothing but nodes."""

    def nodes(self, graph: int) -> list[object]:
        assert graph
        return []


@pytest.fixture
def capturer() -> TorchCapturer:
    found = driver_available()
    if not found.ok:
        pytest.skip(found.reason)
    return TorchCapturer(0)


def test_a_capture_that_fails_leaves_the_process_as_it_was(capturer: TorchCapturer) -> None:
    store = GraphStore(Nodes(), capturer)  # type: ignore[arg-type]
    left, out = torch.ones(512, 512, device="cuda"), torch.zeros(512, 512, device="cuda")

    def good() -> None:
        torch.mm(left, left, out=out)

    def bad() -> None:
        good()
        if torch.cuda.is_current_stream_capturing():
            left.sum().item()  # waits for the device

    kept = store.capture("stage", 16, 0, good)
    before = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(CudaUnavailableError, match=r"'stage' cannot be captured with 8 rows"):
            store.capture("stage", 8, 0, bad)
        assert torch.cuda.current_stream() == before
        torch.cuda.empty_cache()  # an internal error where the allocator is still in the capture
    _memory_is_used_again()
    store.capture("stage", 4, 0, good)
    for one in (kept, store.graphs[-1]):
        out.zero_()
        one.owner.replay()
        torch.cuda.synchronize()
        assert (out == 512).all()


def _memory_is_used_again() -> None:
    """What a second stream has used comes back once that stream is done with it."""
    stream, addresses = torch.cuda.Stream(), set()
    for _ in range(8):
        block = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        addresses.add(block.data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block.add_(1)
        block.record_stream(stream)
        del block
        torch.cuda.synchronize()
    assert len(addresses) < 8


def test_random_numbers_still_come_after_a_capture(capturer: TorchCapturer) -> None:
    """What PyTorch made for the graph's generator is of use outside inference mode too."""
    owner = capturer.capture(lambda: torch.ones(4, device="cuda").add_(1), capturer.new_pool())[1]
    graph, drawn = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        drawn.uniform_()
    graph.replay()
    torch.cuda.synchronize()
    assert (drawn > 0).any()
    del owner


def test_the_memory_of_a_capture_is_counted(capturer: TorchCapturer) -> None:
    """Intermediate results of 64 MiB and a cuBLAS workspace, nearly all of it in the first."""
    store = GraphStore(Nodes(), capturer)  # type: ignore[arg-type]
    left = torch.ones(4096, 4096, device="cuda")
    out = torch.zeros(4096, 4096, device="cuda")

    def call() -> None:
        torch.mm(left @ left, left, out=out)

    large, small = (store.capture("stage", rows, 0, call).bytes for rows in (2, 1))
    assert 64 << 20 <= large < 256 << 20
    assert small < 32 << 20
