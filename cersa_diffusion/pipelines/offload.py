"""CPU offloading: hooks are removed while layers change; and a model that computes on a device from CPU memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cersa_diffusion.private_names import REAPPLY_GROUP_OFFLOADING


@contextmanager
def without_offloading(pipeline) -> Iterator[None]:
    """Removes the offloading hooks of a diffusers pipeline during the block and restores them, also after an error.

    Hooks refer to the tensors of the layers that existed when the hooks were added; new layers would stay on the wrong device.
    The same kind of offloading (model, sequential or group) is restored on the same device.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    offloading = _offloading(pipeline, modules)
    if offloading:
        pipeline.remove_all_hooks()
    try:
        yield
    finally:
        if offloading:
            enable, device = offloading
            enable(device=device)
        for module in modules:
            # diffusers has no public function that renews the groups; its LoRA loader calls this one after a change.
            REAPPLY_GROUP_OFFLOADING.get()(module)


def _offloading(pipeline, modules: list[nn.Module]):
    """The method that added the hooks and its device, or None. The hooks of a device map do not offload."""
    # Imported here: accelerate would make `import cersa_diffusion` slower.
    from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook

    def hooks_of(module: nn.Module) -> list:
        hook = getattr(module, "_hf_hook", None)
        return [] if hook is None else list(hook.hooks) if isinstance(hook, SequentialHook) else [hook]

    if getattr(pipeline, "hf_device_map", None) is not None:
        return None
    methods = {CpuOffload: pipeline.enable_model_cpu_offload, AlignDevicesHook: pipeline.enable_sequential_cpu_offload}
    for module in modules:
        for hook_class, method in methods.items():
            if any(isinstance(hook, hook_class) for hook in hooks_of(module)):
                # With sequential offload the hook of the whole model has no device, but those of its submodules have.
                hooks = (hook for submodule in module.modules() for hook in hooks_of(submodule))
                return method, next(hook.execution_device for hook in hooks if hook.execution_device is not None)
    return None


@contextmanager
def run_from_cpu(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Lets a model in CPU memory compute on an accelerator in the block: each weight is there only while its layer computes.

    Args:
        model: the model; afterwards all of its weights are as before.
        device: where it computes; on a CPU nothing is done.
    """
    if device.type == "cpu":
        yield
        return
    # Imported here: accelerate would make `import cersa_diffusion` slower.
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(model, execution_device=device, offload_buffers=True)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
