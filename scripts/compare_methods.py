#!/usr/bin/env python
"""Compares methods of fine-tuning: trains each at its own best learning rate with several seeds, and writes one report.

docs/comparing.md describes study files; benchmarks/study_emoji.toml is an example. The same command continues a comparison that
was interrupted.
"""

import argparse
import signal
import sys
import warnings
from pathlib import Path

from cersa_diffusion.errors import CersaError
from cersa_diffusion.pipelines.draw import DRAWING_DTYPES, DTYPE_HELP
from cersa_diffusion.study.definition import read_study
from cersa_diffusion.study.engines import ENGINES, find_engine
from cersa_diffusion.study.run import compare


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("study", type=Path, help="study file (TOML)")
    parser.add_argument("--output", type=Path, required=True, help="folder for cells, table, pictures and report")
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="process", help="ray: several cells at once, on several machines"
    )
    changes = parser.add_argument_group("instead of what the study says")
    changes.add_argument("--subjects", nargs="+", metavar="NAME", help="only these subjects")
    changes.add_argument("--rows", nargs="+", metavar="NAME", help="the base and these; 'matched': the rows of matched memory")
    changes.add_argument("--seeds", type=int, help="number of trainings for each row and subject")
    changes.add_argument("--steps", type=int, help="number of training steps")
    changes.add_argument("--dtype", choices=list(DRAWING_DTYPES), help=DTYPE_HELP)
    matched = changes.add_mutually_exclusive_group()
    matched.add_argument("--lora_rank", type=int, help="matched memory: CERSA gets the bytes of LoRA with this rank")
    matched.add_argument("--memory_budget", help="matched memory: largest memory of LoRA and of CERSA, such as 80MB")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # SIGTERM acts like Ctrl-C: the cell that is being trained writes its checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        engine = find_engine(arguments.engine)
        study = read_study(
            arguments.study,
            subjects=arguments.subjects,
            rows=arguments.rows,
            seeds=arguments.seeds,
            steps=arguments.steps,
            dtype=arguments.dtype,
            lora_rank=arguments.lora_rank,
            budget=arguments.memory_budget,
        )
        table = compare(study, arguments.output, engine=engine)
    except CersaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    print(f"{table}\n\nopen {arguments.output / 'report.html'}; table.csv, table.json, costs.csv and pictures/ are beside it")


if __name__ == "__main__":
    main()
