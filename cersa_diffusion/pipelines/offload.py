"""Changing the layers of a pipeline whose models are offloaded to the CPU: hooks off, change, the same hooks on again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cersa_diffusion.private_names import REAPPLY_GROUP_OFFLOADING


@contextmanager
def without_offloading(pipeline) -> Iterator[None]:
    """Takes the offloading hooks of a diffusers pipeline off for the block, also when it raises.

    Hooks hold on to the tensors of the layers they were made for; new layers would be left on the wrong device. Only what was
    there comes back: model offload, sequential offload or group offload, on the same device.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    enable_again = _offloading(pipeline, modules)
    if enable_again:
        pipeline.remove_all_hooks()
    try:
        yield
    finally:
        if enable_again:
            method, device = enable_again
            method(device=device)
        for module in modules:
            # diffusers has no public way to renew the groups; its own LoRA loader calls this after a change.
            REAPPLY_GROUP_OFFLOADING.get()(module)


def _offloading(pipeline, modules: list[nn.Module]):
    """(the method that put the hooks there, its device), or None. Hooks of a device map are not offloading."""
    # Imported here: `import cersa_diffusion` should not wait for it.
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
                # With sequential offload the hook of the whole model knows no device, those of its parts do.
                hooks = (hook for part in module.modules() for hook in hooks_of(part))
                return method, next(hook.execution_device for hook in hooks if hook.execution_device is not None)
    return None
