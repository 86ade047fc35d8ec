"""`cersa analyse`: the analyses of the paper. Each command writes CSV files and pictures and prints a table."""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch

from cersa_diffusion.analysis.output import Output, text_of
from cersa_diffusion.config import listed_targets
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.families.names import DENOISERS
from cersa_diffusion.memory.cost import OPTIMIZERS
from cersa_diffusion.memory.plot import PLOTTED_ALPHAS
from cersa_diffusion.text import table

# Each command imports its modules itself, because transformers and peft are slow to import.
MIB = 2**20


def _show(rows: Sequence[Mapping], formats: Mapping[str, str], *paths) -> None:
    print(table(*text_of(rows, formats)))
    print(f"\nwritten: {', '.join(map(str, paths))}")


def _output(arguments: argparse.Namespace, name: str) -> Output:
    if find_spec("datasets") is None:
        raise ConfigError("the analyses need datasets, which is not installed: pip install 'cersa-diffusion[plot,train]'")
    return Output(arguments.output, name)


def _patterns(arguments: argparse.Namespace) -> str | list[str]:
    """The target layers of two checkpoints: a preset for all architectures, name endings, one regular expression, or all."""
    from cersa_diffusion.classification.targets import LAYERS, PRESETS

    targets = arguments.target_modules
    if targets is None or targets == ["all-linear"]:
        return "all-linear"
    if len(targets) == 1 and targets[0] in PRESETS:
        endings = {names[kind] for names in LAYERS.values() for kind in PRESETS[targets[0]]}
        return rf".*\.(?:{'|'.join(sorted(endings))})"
    return listed_targets(targets)


def _ranks(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "ranks")
    from cersa_diffusion.analysis.models import open_dense
    from cersa_diffusion.analysis.spectra import check_alphas, draw_ranks, layer_spectra, rank_rows

    check_alphas(arguments.alphas)
    spectra = layer_spectra(open_dense(arguments.model), arguments.target_modules)
    rows = rank_rows(spectra, arguments.alphas)
    shares_by_kind = defaultdict(list)
    for row in rows:
        shares_by_kind[row["kind"], row["alpha"]].append(row["share"])
    summary = [
        {"kind": kind, "alpha": alpha, "layers": len(shares)}
        | {"lowest": min(shares), "mean": sum(shares) / len(shares), "highest": max(shares)}
        for (kind, alpha), shares in shares_by_kind.items()
    ]
    formats = {"kind": "", "alpha": "g", "layers": "d"} | dict.fromkeys(("lowest", "mean", "highest"), ".3f")
    print("k divided by the full rank")
    _show(summary, formats, output.csv(rows), output.picture(draw_ranks(rows)))


def _compression(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "compression")
    from cersa_diffusion.analysis.models import open_dense
    from cersa_diffusion.analysis.spectra import check_alphas, compression_rows, draw_compression, layer_spectra

    check_alphas(arguments.alphas or [1.0])
    rows = []
    for model in arguments.models:
        components = open_dense(model)
        for targets in arguments.target_modules or [None]:
            spectra = layer_spectra(components, targets and targets.split(","), default="QKV")
            name = f"{model.rstrip('/').rsplit('/', 1)[-1]} {targets or ''}".strip()
            options = {"alphas": arguments.alphas} if arguments.alphas else {}
            rows += compression_rows(name, spectra, lora_rank=arguments.rank, **options)
    formats = {"model": "", "layers": "d", "alpha": "g", "compression": ".3f", "lora": ".3f"}
    _show(rows, formats, output.csv(rows), output.picture(draw_compression(rows, arguments.rank)))


def _memory(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "memory")
    from cersa_diffusion.analysis.kinds import targets_by_component
    from cersa_diffusion.analysis.memory_table import TableSettings, draw_memory, in_columns_of_the_paper, memory_rows
    from cersa_diffusion.analysis.models import open_dense

    settings = TableSettings(
        lora_ranks=arguments.ranks,
        svfit_rank=arguments.svfit_rank,
        off_diagonals=arguments.off_diagonals,
        alphas=arguments.alphas,
        optimizer=arguments.optimizer,
        weight_dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
    )
    components = open_dense(arguments.model)
    rows = memory_rows(components, targets_by_component(components, arguments.target_modules, "QKV"), settings)
    table_rows = in_columns_of_the_paper(rows)
    formats = {column: "" if number == 0 else ".3f" for number, column in enumerate(table_rows[0])}
    _show(table_rows, formats, output.csv(table_rows), output.csv(rows, "-bytes.csv"), output.picture(draw_memory(rows)))


def _throughput(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "throughput")
    from cersa_diffusion.analysis.kinds import targets_by_component
    from cersa_diffusion.analysis.models import open_dense
    from cersa_diffusion.analysis.throughput import default_methods, draw_throughput, random_inputs, throughput_rows

    methods = default_methods(arguments.alphas, arguments.ranks)
    components = open_dense(arguments.model)
    component = next((name for name in DENOISERS if name in components), "model")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = components[component].to(device)
    targets = targets_by_component({component: model}, arguments.target_modules, "QKV")[component]
    rows = throughput_rows(
        model,
        targets,
        methods,
        random_inputs(model, arguments.batch, arguments.tokens),
        steps=arguments.steps,
        rounds=arguments.rounds,
        autocast=getattr(torch, arguments.autocast) if arguments.autocast else None,
        report=print,
    )
    title = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    figure = draw_throughput(rows, f"{arguments.model}, batch {arguments.batch}, {title}")
    formats = {"method": "", "seconds": ".4f", "examples_per_second": ".2f"} | {
        f"to_{name}{part}": ".3f" for name in ("full", "lora") for part in ("", "_lowest", "_highest")
    }
    _show(rows, formats, output.csv(rows), output.picture(figure))


def _ablations(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "ablations")
    from cersa_diffusion.analysis.ablations import draw_ablations, run_ablations, summary_rows
    from cersa_diffusion.classification.command import parse_command
    from cersa_diffusion.classification.settings import ImageData, TextData

    tasks = {"pictures": (ImageData, ("vit-large", "vit-base")), "sentences": (TextData, ("deberta-v3-base",))}
    options = [*arguments.training, "--output_dir", arguments.output]
    settings, data, training, preset = parse_command(*tasks[arguments.kind], "the training of every variant", options)
    rows = run_ablations(settings, data, training, tables=arguments.tables, seeds=arguments.seeds, preset=preset)
    summary = [row | {"memory (MiB)": row["memory"] / MIB} for row in summary_rows(rows)]
    formats = {"table": "d", "variant": "", "metric": "", "seeds": "d", "mean": ".4f", "deviation": ".4f", "trained": "d"}
    paths = output.csv(rows, "-runs.csv"), output.csv(summary_rows(rows)), output.picture(draw_ablations(rows))
    _show(summary, formats | {"memory (MiB)": ".2f"}, *paths)


def _similarity(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "similarity")
    from cersa_diffusion.analysis import similarity
    from cersa_diffusion.analysis.models import open_pair
    from cersa_diffusion.analysis.spectra import check_alphas

    check_alphas([arguments.alpha])
    pairs = open_pair(arguments.base, arguments.tuned, _patterns(arguments), arguments.exclude_modules)
    unknown = sorted(set(arguments.layers or []) - {pair.name for pair in pairs})
    if unknown:
        raise ConfigError(f"layers: {unknown} are not among the {len(pairs)} compared layers, e.g. {pairs[0].name}")
    layers = arguments.layers or similarity.middle_and_ends(pairs)
    results = similarity.layer_similarities(pairs, arguments.alpha, grids_of=layers)
    rows = similarity.kind_rows(results)
    paths = [output.csv(rows), output.csv(similarity.similarity_rows(results), "-layers.csv")]
    paths += [output.csv(similarity.grid_rows(results), "-grids.csv")]
    paths += [output.picture(similarity.draw_grids(results, side), f"-{side}.png") for side in ("output", "input")]
    formats = {name: "" if name == "kind" else "d" if name == "layers" else ".4%" for name in rows[0]}
    _show(rows, formats, *paths)


def _intruders(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "intruders")
    from cersa_diffusion.analysis.intruders import THRESHOLDS, check_search, draw_intruders, intruder_rows, intruder_totals
    from cersa_diffusion.analysis.models import open_pair

    thresholds = arguments.thresholds or THRESHOLDS
    check_search(arguments.leading, thresholds)
    pairs = open_pair(arguments.base, arguments.tuned, _patterns(arguments), arguments.exclude_modules)
    rows = intruder_rows(pairs, thresholds, leading=arguments.leading)
    formats = {"threshold": "g", "layers": "d", "intruders": "d", "share": ".2%"}
    _show(intruder_totals(rows), formats, output.csv(rows), output.picture(draw_intruders(rows)))


def _forgetting(arguments: argparse.Namespace) -> None:
    output = _output(arguments, "forgetting")
    from cersa_diffusion.analysis.forgetting import draw_forgetting, forgetting_rows, method_rows, rate_rows

    rows = forgetting_rows(arguments.runs, batch=arguments.batch, device=arguments.device)
    rates = rate_rows(rows)
    methods = method_rows(rates)
    paths = output.csv(methods), output.csv(rates, "-runs.csv"), output.csv(rows, "-data.csv")
    formats = {"method": "", "runs": "d"} | dict.fromkeys(("average_forgetting_rate", "lowest", "highest"), ".2%")
    _show(methods, formats, *paths, output.picture(draw_forgetting(rows)))


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default="outputs/analysis", help="folder for the CSV files and pictures")
    parser.set_defaults(run=run)
    return parser


def _add_targets(parser: argparse.ArgumentParser, default: str) -> None:
    text = f"layers: QV, QKV, QKVP, all, all-linear, name endings, or one regular expression (default: {default})"
    parser.add_argument("--target_modules", nargs="+", metavar="NAME", default=argparse.SUPPRESS, help=text)
    parser.set_defaults(target_modules=None)


def _add_models(commands) -> None:
    where = "folder or hub id of a model, a pipeline or a finished classification result"
    known = "Q, K and V of known architectures, else all linear layers"
    ranks = _command(commands, "ranks", _ranks, "rank by layer and kind at several alphas (Fig. 3)")
    ranks.add_argument("model", help=where)
    ranks.add_argument("--alphas", type=float, nargs="+", default=list(PLOTTED_ALPHAS), help="shares of the energy")
    _add_targets(ranks, "Q, K, V, P, UP and DN of known architectures, else all linear layers")

    curves = _command(commands, "compression", _compression, "training memory over dense weights against alpha (Fig. 7)")
    curves.add_argument("models", nargs="+", help=f"each: {where}")
    curves.add_argument("--alphas", type=float, nargs="+", help="energy shares; if not given: 0.80 to 0.95 in steps of 0.01")
    curves.add_argument("--rank", type=int, default=32, help="rank of the LoRA in the same figure")
    _add_targets(curves, f"{known}; each name is one curve, names joined by commas share a curve")

    memory = _command(commands, "memory", _memory, "computed memory of every method in the columns of Table 14")
    memory.add_argument("model", help=where)
    memory.add_argument("--alphas", type=float, nargs="+", default=[0.95, 0.92, 0.9, 0.85, 0.8], help="alphas of CERSA")
    memory.add_argument("--ranks", type=int, nargs="*", default=[8, 32], help="ranks of LoRA")
    memory.add_argument("--svfit_rank", type=int, default=768, help="singular values that SVFit trains")
    memory.add_argument("--off_diagonals", type=int, default=2, help="off-diagonals on either side in SVFT")
    memory.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="optimizer whose state is counted")
    memory.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of frozen weights; if not given: float32")
    _add_targets(memory, known)

    speed = _command(commands, "throughput", _throughput, "training speed of CERSA, LoRA and full fine-tuning (Fig. 9)")
    speed.add_argument("model", help=f"{where}; of a pipeline, the UNet is measured")
    speed.add_argument("--alphas", type=float, nargs="+", default=[0.95, 0.9, 0.85, 0.8], help="alphas of CERSA")
    speed.add_argument("--ranks", type=int, nargs="*", default=[8, 32], help="ranks of LoRA; ratios are to the last rank")
    speed.add_argument("--batch", type=int, default=32, help="examples per step")
    speed.add_argument("--tokens", type=int, help="length of sentences or prompts; if not given: 128 or 77")
    speed.add_argument("--steps", type=int, default=3, help="steps of one method in a round, timed together")
    speed.add_argument("--rounds", type=int, default=5, help="timed rounds over all methods, after one untimed round")
    speed.add_argument("--autocast", choices=["bfloat16", "float16"], help="compute in this dtype")
    speed.add_argument("--device", help="device; if not given: the GPU if there is one")
    _add_targets(speed, known)


def _add_runs(commands) -> None:
    sweep = _command(commands, "ablations", _ablations, "the ablations of Tables 2 to 6, on any classification task")
    sweep.add_argument("kind", choices=["pictures", "sentences"], help="what is classified")
    sweep.add_argument("--tables", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="tables of the paper")
    sweep.add_argument("--seeds", type=int, nargs="+", default=[0], help="every variant is trained with each seed")
    text = "must be last: everything after it is passed to scripts/train_vit_cersa.py or scripts/train_glue_cersa.py"
    sweep.add_argument("--training", nargs=argparse.REMAINDER, required=True, help=text)

    forgetting = _command(commands, "forgetting", _forgetting, "average forgetting rate on other data sets (Table 15)")
    forgetting.add_argument(
        "runs", nargs="+", help="output_dir of finished classification runs with one model and several data sets"
    )
    forgetting.add_argument("--batch", type=int, default=64, help="examples per forward pass")
    forgetting.add_argument("--device", help="device; if not given: the GPU if there is one")


def _add_pairs(commands) -> None:
    text = "similarity psi between the subspaces of two checkpoints (Table 16, Fig. 11, 12)"
    similarity = _command(commands, "similarity", _similarity, text)
    similarity.add_argument("--alpha", type=float, default=0.95, help="share of the energy in the compared subspaces")
    similarity.add_argument("--layers", nargs="+", help="layers of the heat maps; if not given: first, middle, last of each kind")
    intruders = _command(commands, "intruders", _intruders, "intruder dimensions (arXiv 2410.21228) of a tuned checkpoint")
    intruders.add_argument("--leading", type=int, default=10, help="number of examined singular vectors of the tuned weight")
    intruders.add_argument("--thresholds", type=float, nargs="+", help="thresholds of the cosine; if not given: 0.3 to 0.9")
    for parser in (similarity, intruders):
        parser.add_argument("base", help="folder or hub id of a model or pipeline, or a safetensors file")
        parser.add_argument("tuned", help="the same, or an adapter (CERSA, peft, LoRA of a pipeline), or the result of a run")
        parser.add_argument("--exclude_modules", nargs="+", metavar="NAME", help="name endings of layers to leave out")
        _add_targets(parser, "all linear layers")


def add_analyse(commands) -> None:
    """Adds the command."""
    text = "the analyses of the paper: spectra, memory, speed, subspaces, forgetting, ablations"
    analyses = commands.add_parser("analyse", help=text).add_subparsers(required=True, metavar="ANALYSIS")
    _add_models(analyses)
    _add_runs(analyses)
    _add_pairs(analyses)
