"""What this machine has. `python -m equilibrium_mcore.parallel.host` prints it."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from equilibrium_mcore.config.rule_kit import Host
from equilibrium_mcore.parallel import accelerator

FAST_PACKAGES = (
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "nvidia-modelopt",
)


def describe_host() -> Host:
    """Facts that a config can ask for. Does not create a CUDA context beyond naming the device."""
    if not accelerator.has_cuda():
        return Host(memory_gib=_memory_gib())
    import torch

    return Host(
        has_cuda=True,
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        has_mamba_ssm=importlib.util.find_spec("mamba_ssm") is not None,
        device_name=torch.cuda.get_device_name(),
        compute_capability=torch.cuda.get_device_capability(),
    )


def _memory_gib() -> float | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex is here; the registry's `apex` is another project without `amp_C`."""
    return all(importlib.util.find_spec(name) is not None for name in ("apex", "amp_C"))


def host_report() -> str:
    """A readable list of devices, packages and what will be used."""
    import torch

    host = describe_host()
    lines = [
        f"device               {host.device_name}",
        f"torch                {torch.__version__}",
        f"megatron-core        {_version('megatron-core')}",
    ]
    lines += [f"{name:<20} {_version(name)}" for name in FAST_PACKAGES]
    lines.append(f"{'apex (NVIDIA)':<20} {'found' if has_nvidia_apex() else 'not found'}")
    engine = host.has_cuda and host.has_transformer_engine
    lines.append(f"linear, norm, attention: {'Transformer Engine' if engine else 'PyTorch'}")
    scan = engine and host.has_mamba_ssm
    lines.append(f"Mamba-2 scan:            {'mamba-ssm (Triton)' if scan else 'PyTorch'}")
    precisions = ["fp32", "bf16"] + (["fp16"] if host.has_cuda else [])
    if engine and (host.compute_capability or (0, 0)) >= (8, 9):
        precisions.append("fp8")
    lines.append(f"precisions:              {', '.join(precisions)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(host_report())
