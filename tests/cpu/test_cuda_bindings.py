"""The driver interface through the real ``cuda.bindings``, into a stand-in for the driver library.

The stand-in writes down what arrives in C: order and value of arguments, fields of records. So a
call that is marshalled wrongly is seen here, and not on the first GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sn72engine import _deps
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import MissingDependencyError

COMPILER = shutil.which("g++")
ROOT = Path(__file__).parents[2]

STAND_IN = r"""
#include <dlfcn.h>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
typedef std::uintptr_t P;
typedef unsigned long long U;
static P next_handle = 0x1000;
static void say(const char* format, ...) {
  std::FILE* file = std::fopen(std::getenv("STAND_IN_LOG"), "a");
  va_list list;
  va_start(list, format);
  std::vfprintf(file, format, list);
  va_end(list);
  std::fputc('\n', file);
  std::fclose(file);
}
static int give(P* out) { *out = next_handle += 16; return 0; }
struct Kernel {  // CUDA_KERNEL_NODE_PARAMS_v2
  P func; unsigned grid[3], block[3], shared; void** params; void** extra; P kern; P ctx;
};
struct Copy {  // CUDA_MEMCPY3D
  U sx, sy, sz, slod; int stype; P shost; U sdev; P sarray; P r0; U spitch, sheight;
  U dx, dy, dz, dlod; int dtype; P dhost; U ddev; P darray; P r1; U dpitch, dheight;
  U width, height, depth;
};
struct Conditional { U handle; int type; unsigned size; P* out; P ctx; };
struct Node { int type; int r0[3]; Conditional conditional; };
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuGetErrorName(int, const char** s) { *s = "CUDA_ERROR_INVALID_VALUE"; return 0; }
int cuCtxGetCurrent(P* c) { *c = 0xC0; return 0; }
int cuCtxPushCurrent_v2(P c) { say("enter %lx", c); return 0; }
int cuCtxPopCurrent_v2(P* c) { say("leave"); *c = 0xC0; return 0; }
int cuMemAlloc_v2(P* p, std::size_t n) { say("allocate %zu", n); return n == 13 ? 1 : give(p); }
int cuMemFree_v2(P p) { say("free %lx", p); return 0; }
int cuMemHostAlloc(P* p, std::size_t n, unsigned f) { say("pin %zu %u", n, f); return give(p); }
int cuMemFreeHost(P p) { say("unpin %lx", p); return 0; }
int cuStreamCreate(P* p, unsigned f) { say("stream %u", f); return give(p); }
int cuStreamDestroy_v2(P p) { say("no stream %lx", p); return 0; }
int cuEventCreate(P* p, unsigned f) { say("event %u", f); return give(p); }
int cuEventDestroy_v2(P p) { say("no event %lx", p); return 0; }
int cuEventRecord(P e, P s) { say("record %lx %lx", e, s); return 0; }
int cuEventRecord_ptsz(P e, P s) { return cuEventRecord(e, s); }
int cuEventSynchronize(P e) { say("wait %lx", e); return 0; }
int cuMemcpyAsync(P d, P s, std::size_t n, P q) {
  say("copy %lx %lx %zu %lx", d, s, n, q);
  return 0;
}
int cuGraphCreate(P* g, unsigned f) { say("graph %u", f); return give(g); }
int cuGraphDestroy(P g) { say("no graph %lx", g); return 0; }
int cuGraphConditionalHandleCreate(P* h, P g, P c, unsigned d, unsigned f) {
  say("condition %lx %lx %u %u", g, c, d, f);
  return give(h);
}
int cuGraphAddKernelNode_v2(P* n, P g, const P* deps, std::size_t count, const Kernel* k) {
  say("kernel %lx after %zu %lx: grid %u %u %u block %u %u %u shared %u kern %lx ctx %lx first %d",
      g, count, count ? deps[0] : 0, k->grid[0], k->grid[1], k->grid[2], k->block[0], k->block[1],
      k->block[2], k->shared, k->kern, k->ctx, static_cast<int*>(k->params[0])[6]);
  return give(n);
}
int cuGraphAddMemcpyNode(P* n, P g, const P* deps, std::size_t count, const Copy* c, P ctx) {
  say("memcpy %lx after %zu %lx: %llx type %d to %llx type %d, "
      "%llu x %llu x %llu pitch %llu ctx %lx",
      g, count, count ? deps[0] : 0, c->sdev, c->stype, c->ddev, c->dtype, c->width, c->height,
      c->depth, c->spitch, ctx);
  return give(n);
}
int cuGraphAddChildGraphNode(P* n, P g, const P* deps, std::size_t count, P child) {
  say("child %lx after %zu %lx: %lx", g, count, count ? deps[0] : 0, child);
  return give(n);
}
int cuGraphAddNode_v2(P* n, P g, const P* deps, const U* edges, std::size_t count, Node* node) {
  Conditional& c = node->conditional;
  say("node %lx after %zu %lx edge %llx: type %d handle %llx kind %d size %u ctx %lx", g, count,
      count ? deps[0] : 0, count ? edges[0] : 0, node->type, c.handle, c.type, c.size, c.ctx);
  static P bodies[8];
  for (unsigned b = 0; b < c.size; ++b) give(&bodies[b]);
  c.out = bodies;
  return give(n);
}
int cuGraphGetNodes(P g, P* nodes, std::size_t* count) {
  if (!nodes) { *count = 3; return 0; }
  for (int i = 0; i < 3; ++i) nodes[i] = 0x700 + i;
  *count = 3;
  return 0;
}
int cuGraphNodeGetType(P n, int* type) { *type = n == 0x700 ? 0 : n == 0x701 ? 4 : 10; return 0; }
int cuGraphChildGraphNodeGetGraph(P n, P* g) { *g = 0x900; return 0; }
int cuGraphInstantiateWithFlags(P* e, P g, U f) {
  say("executable %lx %llu", g, f);
  return give(e);
}
int cuGraphUpload(P e, P s) { say("upload %lx %lx", e, s); return 0; }
int cuGraphLaunch(P e, P s) { say("launch %lx %lx", e, s); return 0; }
int cuLaunchKernel(P f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, P q, void** params, void** extra) {
  say("run %lx on %lx: grid %u %u %u block %u %u %u shared %u first %d extra %d", f, q, gx, gy, gz,
      bx, by, bz, shared, static_cast<int*>(params[0])[6], extra != nullptr);
  return gx == 9 ? 1 : 0;
}
int cuGraphExecDestroy(P e) { say("no executable %lx", e); return 0; }
int cuGetProcAddress_v2(const char* name, void** out, int, U, int* status) {
  const char* endings[] = {"_v2", "", "WithFlags"};
  *out = nullptr;
  for (const char* ending : endings) {
    char full[200];
    std::snprintf(full, sizeof full, "%s%s", name, ending);
    if ((*out = dlsym(RTLD_DEFAULT, full))) break;
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (self && (*out = dlsym(self, full))) break;
  }
  if (status) *status = *out ? 0 : 1;
  return *out ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** out, int version, U flags) {
  return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}
}
"""

PROGRAM = """
from sn72engine.cuda import layout
from sn72engine.cuda.api import NodeKind
from sn72engine.cuda.bindings import CudaDriver
from sn72engine.cuda.kernels import Kernels
from sn72engine.errors import CudaUnavailableError

driver = CudaDriver(Kernels("fatbin", {"sn72_begin": 0xBE}, None), (13, 0))
assert driver.switch_nodes
assert not CudaDriver(Kernels("fatbin", {}, None), (12, 8)).switch_nodes
with driver.current():
    pass
memory, pinned = driver.allocate(100), driver.allocate_host(200)
stream, event = driver.new_stream(), driver.new_event()
driver.copy(memory, pinned, 50, stream)
driver.record(event, stream)
driver.wait(event)
graph, child = driver.new_graph(), driver.new_graph()
condition = driver.new_condition(graph, 3)
args = layout.BeginArgs(samples=1, scored=2, start_ns=3, capacity=300)
kernel = driver.add_kernel(graph, [], layout.begin(args))
copied = driver.add_copy(graph, [kernel], memory, pinned, 77)
ran = driver.add_child(graph, [copied], child)
node, bodies = driver.add_switch(graph, [ran], condition, 3)
driver.add_switch(graph, [], condition, 2)
assert len(set(bodies)) == 3 and node not in bodies
single, body = driver.add_if(graph, [node], condition)
assert driver.nodes(graph) == [
    (NodeKind.KERNEL, None), (NodeKind.CHILD, 0x900), (NodeKind.ALLOCATE, None)
]
executable = driver.instantiate(graph, stream)
driver.launch_graph(executable, stream)
kernels = Kernels("fatbin", {"sn72_begin": 0xBE}, None)
kernels.launch(layout.begin(args), stream)
args.capacity = 256 * 9
try:
    kernels.launch(layout.begin(args), stream)
except CudaUnavailableError as error:
    assert "launching sn72_begin failed with" in str(error), error
else:
    raise SystemExit("a failure went unnoticed")
driver.destroy_executable(executable)
driver.destroy_graph(graph)
driver.destroy_event(event)
driver.destroy_stream(stream)
driver.free_host(pinned)
driver.free(memory)
try:
    driver.allocate(13)
except CudaUnavailableError as error:
    assert "cuMemAlloc failed with" in str(error), error
else:
    raise SystemExit("a failure went unnoticed")
names = dict(memory=memory, pinned=pinned, stream=stream, event=event, graph=graph, child=child,
             condition=condition, kernel=kernel, copied=copied, ran=ran, node=node,
             executable=executable)
print(" ".join(f"{name}={value:x}" for name, value in names.items()))
"""


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is a Linux library")
@pytest.mark.skipif(driver_available().ok, reason="there is a driver here: see tests/gpu")
def test_every_call_arrives_as_meant(tmp_path: Path) -> None:
    try:
        _deps.require("cuda.bindings", purpose="check the calls", submodule="driver")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    source, log = tmp_path / "driver.cpp", tmp_path / "log"
    source.write_text(STAND_IN)
    library = tmp_path / "libcuda.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", "-w", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "STAND_IN_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    n = dict(word.split("=") for word in done.stdout.split())
    assert log.read_text().splitlines() == [
        "enter c0",
        "leave",
        "allocate 100",
        "pin 200 3",
        "stream 1",
        "event 2",
        f"copy {n['memory']} {n['pinned']} 50 {n['stream']}",
        f"record {n['event']} {n['stream']}",
        f"wait {n['event']}",
        "graph 0",
        "graph 0",
        f"condition {n['graph']} c0 3 1",
        f"kernel {n['graph']} after 0 0: grid 2 1 1 block 256 1 1 shared 0 kern be ctx c0 "
        "first 300",
        f"memcpy {n['graph']} after 1 {n['kernel']}: {n['pinned']} type 4 to {n['memory']} type 4, "
        "77 x 1 x 1 pitch 77 ctx c0",
        f"child {n['graph']} after 1 {n['copied']}: {n['child']}",
        f"node {n['graph']} after 1 {n['ran']} edge 0: type 13 handle {n['condition']} kind 2 "
        "size 3 ctx c0",
        f"node {n['graph']} after 0 0 edge 0: type 13 handle {n['condition']} kind 2 size 2 ctx c0",
        f"node {n['graph']} after 1 {n['node']} edge 0: type 13 handle {n['condition']} kind 0 "
        "size 1 ctx c0",
        f"executable {n['graph']} 0",
        f"upload {n['executable']} {n['stream']}",
        f"launch {n['executable']} {n['stream']}",
        f"run be on {n['stream']}: grid 2 1 1 block 256 1 1 shared 0 first 300 extra 0",
        f"run be on {n['stream']}: grid 9 1 1 block 256 1 1 shared 0 first 2304 extra 0",
        f"no executable {n['executable']}",
        f"no graph {n['graph']}",
        f"no event {n['event']}",
        f"no stream {n['stream']}",
        f"unpin {n['pinned']}",
        f"free {n['memory']}",
        "allocate 13",
    ]
