"""The learning rates of a run that resumes from a checkpoint."""

import warnings
from collections.abc import Sequence

from torch.optim.lr_scheduler import LambdaLR


def keep_rates(schedule: LambdaLR, rates: Sequence[float], step: int) -> None:
    """Continues a loaded schedule with the learning rates of this run; warns if the checkpoint has different ones.

    Args:
        schedule: the schedule with the state of the checkpoint; its optimizer also has it.
        rates: the base rates of this run, one for each parameter group of the optimizer.
        step: optimizer steps done.
    """
    changes = {(saved, rate) for saved, rate in zip(schedule.base_lrs, rates, strict=True) if saved != rate}
    # Unchanged rates are not computed again, so that the run continues bit for bit.
    if not changes:
        return
    current = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
    for group, base_rate, rate in zip(schedule.optimizer.param_groups, rates, current, strict=True):
        group["initial_lr"], group["lr"] = base_rate, rate
    # Trackers log `_last_lr` for the next step.
    schedule.load_state_dict(schedule.state_dict() | {"base_lrs": list(rates), "_last_lr": current})
    listed = ", ".join(f"{rate} instead of {saved}" for saved, rate in sorted(changes))
    warnings.warn(f"learning_rate: after step {step} the run continues with {listed}", stacklevel=2)
