"""megatron-core's modules are built in this process, on `meta`."""

from equilibrium_mcore.parallel import accelerator

accelerator.install()  # before megatron-core is imported
