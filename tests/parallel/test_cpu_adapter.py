"""The adapter that lets megatron-core's CUDA calls run on a CPU host, by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from equilibrium_mcore.parallel import accelerator

pytestmark = pytest.mark.skipif(
    accelerator.has_cuda(), reason="the adapter is for hosts without a GPU"
)


@pytest.fixture(scope="module", autouse=True)
def installed():
    accelerator.install()


def test_installing_again_changes_nothing():
    before = torch.empty, torch.Tensor.to, torch.distributed.all_to_all_single
    accelerator.install()
    assert before == (torch.empty, torch.Tensor.to, torch.distributed.all_to_all_single)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 3)]
)
def test_tensors_asked_for_on_cuda_are_on_the_cpu(device):
    made = [
        torch.empty(2, device=device),
        torch.zeros(2, device=device, dtype=torch.int32),
        torch.tensor([1.0, 2.0], device=device),
        torch.arange(3, device=device),
        torch.ones_like(torch.empty(2), device=device),
        torch.empty(2).new_zeros(2, device=device),
        torch.empty(2).to(device),
        torch.empty(2).to(device=device, dtype=torch.float64),
        torch.empty(2).cuda(),
        torch.empty(2, pin_memory=True),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[1].dtype == torch.int32
    assert made[7].dtype == torch.float64


def test_other_devices_are_left_alone():
    assert torch.empty(2, device="meta").is_meta
    assert torch.empty(2).to("meta").is_meta
    with torch.device("meta"):  # transformers loads models under it
        made = [torch.empty(2), torch.arange(3), torch.nn.Linear(2, 2).weight]
    assert all(tensor.is_meta for tensor in made)


def test_parameters_are_recognised_by_their_cuda_names():
    assert torch.empty(1).type() == "torch.cuda.FloatTensor"
    assert torch.empty(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.empty(1).type(torch.float64).dtype == torch.float64


def test_random_state_is_the_cpus():
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_megatron_trackers_fork_and_come_back():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    torch.manual_seed(5)
    with tracker.fork("one"):
        inside = torch.rand(2)
    outside = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), outside)  # the fork did not move the default state
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), inside)
    with tracker.fork("one"):
        assert not torch.equal(torch.rand(2), inside)  # it went on from where it was


def test_streams_and_events_are_in_order():
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        event.record()
    stream.wait_event(event)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert event.query()
    assert torch.cuda.memory_allocated() == 0


def test_optimizers_and_compiled_functions_still_work():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert weight.max() < 1


def test_nothing_is_touched_before_install():
    """Importing the module is no installation, and a host with a GPU is left alone."""
    code = (
        "import torch; from equilibrium_mcore.parallel import cpu_adapter;"
        "assert not hasattr(torch.cuda, '_equilibrium_cpu_adapter');"
        "torch._C._cuda_getDeviceCount = lambda: 1\n"
        "try: cpu_adapter.install()\n"
        "except RuntimeError as error: assert 'without a CUDA device' in str(error)\n"
        "else: raise SystemExit('installed beside a GPU')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_megatron_imported_too_early_still_runs_uncompiled():
    code = (
        "from megatron.core.activations import squared_relu; import torch\n"
        "from equilibrium_mcore.parallel import accelerator; accelerator.install()\n"
        "assert squared_relu(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
