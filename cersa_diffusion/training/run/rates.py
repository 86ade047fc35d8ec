"""The learning rates of a run that goes on from a checkpoint."""

import warnings
from collections.abc import Sequence

from torch.optim.lr_scheduler import LambdaLR


def keep_rates(schedule: LambdaLR, rates: Sequence[float], step: int) -> None:
    """Lets a schedule that was loaded go on with the rates of this run, from where it is; warns where they were others.

    Args:
        schedule: with the state of the checkpoint, as its optimizer.
        rates: of this run, for each group of the optimizer.
        step: optimizer steps done.
    """
    changes = {(before, own) for before, own in zip(schedule.base_lrs, rates, strict=True) if before != own}
    # Where nothing changes nothing is computed again: the run is to go on bit for bit.
    if not changes:
        return
    now = [rate * course(schedule.last_epoch) for rate, course in zip(rates, schedule.lr_lambdas, strict=True)]
    for group, base, rate in zip(schedule.optimizer.param_groups, rates, now, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    # The last rates are what a log says of the next step.
    schedule.load_state_dict(schedule.state_dict() | {"base_lrs": list(rates), "_last_lr": now})
    said = ", ".join(f"{own} instead of {before}" for before, own in sorted(changes))
    warnings.warn(f"learning_rate: after step {step} the run goes on with {said}", stacklevel=2)
