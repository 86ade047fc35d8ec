"""The paper's baselines that live in the basis of the weight, as settings of the one layer. LoRA and PiSSA are peft's."""

from typing import Literal

from cersa_diffusion.config import CersaConfig


def svfit_config(rank: int = 768, **settings) -> CersaConfig:
    """SVFit (Sun et al., arXiv 2409.05926): the top singular values are trained, everything else stays as it is.

    Args:
        rank: how many; all of a layer that has fewer. The CERSA paper compares with 768.
        settings: of `CersaConfig` (target_modules, exclude_modules).
    """
    return CersaConfig(rank=rank, core="diagonal", residual="keep", **settings)


def svft_config(pattern: Literal["banded", "random", "top_k"] = "banded", off_diagonals: int = 0, **settings) -> CersaConfig:
    """SVFT (Lingam et al., arXiv 2405.19597): a few entries of the whole singular-value matrix are trained, behind a gate.

    Args:
        pattern: which entries; "banded" without off-diagonals is SVFT-plain.
        off_diagonals: on either side of the diagonal; the other patterns train as many entries as the banded one.
        settings: of `CersaConfig` (target_modules, exclude_modules).
    """
    return CersaConfig(alpha=1.0, core="sparse", sparse_pattern=pattern, off_diagonals=off_diagonals, **settings)
