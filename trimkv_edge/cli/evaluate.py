"""``trimkv-eval``: how well a bounded cache answers, against every baseline and the full cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.cli.common import quiet_libraries, run_cli
from trimkv_edge.errors import ConfigError
from trimkv_edge.files import replace_text

if TYPE_CHECKING:
    from trimkv_edge.evaluation.results import Cell, ResultFile
    from trimkv_edge.evaluation.samples import SampleWriter
    from trimkv_edge.evaluation.sweep import Subject, Sweep

_EPILOG = """\
examples:
  trimkv-eval --model tiny                                      the default sweep
  trimkv-eval --model tiny --methods full trimkv:rg trimkv:rg10 streaming snapkv \\
              --tasks multi-query updates --lengths 1024 4096 --budgets 25% 12.5% 64 -o results/tiny
  trimkv-eval artefacts/tiny --tasks multi-query --lengths 2048 an exported artefact: its own policy and budget
  trimkv-eval -o results/tiny --report                          tables and plots again, nothing is run
  trimkv-eval -o results/tiny --against-all trimkv:rg10         against the best baseline and the full cache
  trimkv-eval -o results/tiny --compare trimkv:rg10 snapkv      paired differences, with intervals

A method is a policy, or policy:gates (rg, rg10 or a gate file). Policies global and layer, whose heads share a budget,
take :min-per-head=N (or a share of the budget) and :threshold=ALPHA, as in global:rg10:min-per-head=25%. All methods
read the same streams with the same buffer; they never hold more than budget + buffer entries per head (on average where
heads share a budget). A share of 12.5% is of the stream's length, rounded up to a
multiple of 8. Finished cells are kept in RESULTS/cells.jsonl: an interrupted sweep goes on where it stopped.
"""
_METHODS = ["full", "trimkv", "streaming", "h2o", "snapkv", "keydiff", "r-kv", "tova", "random"]
_TASKS = ["single", "multi-key", "multi-query", "updates", "dialogue"]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-eval",
        description="Measure a bounded cache on recall tasks and plain text, against baselines and the full cache.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", nargs="?", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add("--model", metavar="NAME|ID|DIR", help="a model for the eager engine: a known name, a hub id or a folder")
    add("--weights", type=Path, metavar="DIR", help="folder with the weights of --model")
    add("--engine", metavar="NAME", help="engine of an artefact: onnx, onnx:cuda, onnx:auto, ...")
    add("-o", "--output", type=Path, metavar="DIR", default=Path("results"), help="results folder (default: results)")
    sweep = parser.add_argument_group("sweep").add_argument
    sweep(
        "--methods", nargs="+", metavar="M", help=f"policies, with gates where they need them ({', '.join(_METHODS)})"
    )
    sweep(
        "--tasks", nargs="+", metavar="T", default=_TASKS, help=f"default: {' '.join(_TASKS)}; --list-tasks shows all"
    )
    sweep("--lengths", nargs="+", type=int, metavar="N", default=[1024, 4096], help="tokens per stream")
    sweep("--budgets", nargs="+", metavar="B", default=["25%", "12.5%", "6.25%"], help="entries per KV head, or shares")
    sweep("--buffer", type=int, default=32, metavar="B", help="new tokens between eviction events (default 32)")
    sweep("--samples", type=int, default=32, metavar="N", help="streams per task and length (default 32)")
    sweep("--seed", type=int, default=0, help="of the streams")
    sweep("--lookahead", type=int, default=1, metavar="K", help="look-ahead of scores by retention (default 1)")
    sweep("--text", nargs="+", type=Path, metavar="FILE", help="filler text (default: Python's standard library)")
    sweep("--batch", type=int, default=16, metavar="N", help="streams at once in the eager engine (default 16)")
    sweep("--threads", type=int, metavar="N", help="threads (default: the engine's choice)")
    sweep("--force", action="store_true", help="run finished cells again")
    report = parser.add_argument_group("reports").add_argument
    report("--report", action="store_true", help="only write tables and plots of what is in the results folder")
    report("--compare", nargs=2, metavar=("A", "B"), help="print paired differences A - B of two measured methods")
    report("--against-all", metavar="A", help="print A against the best other method and the full cache, paired")
    report("--no-plots", action="store_true", help="tables only")
    report("--list-tasks", action="store_true", help="say what each task asks, and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    quiet_libraries()
    from trimkv_edge.evaluation.results import ResultFile

    if args.list_tasks:
        from trimkv_edge.evaluation.tasks import TASKS

        for task in TASKS.values():
            print(f"{task.name:<15} {task.asks}{f'  ({task.source})' if task.source else ''}")
        return
    if args.report or args.compare or args.against_all:
        if not args.output.is_dir():
            raise ConfigError(f"{args.output} does not exist: run a sweep first, or give its folder with -o")
        cells = ResultFile(args.output).newest()
        if not cells:
            raise ConfigError(f"{args.output} holds no results yet: run a sweep first")
        from trimkv_edge.evaluation.report import against_all, comparison, pooled

        measured, cells = cells, pooled(cells)
        if args.compare:
            print(comparison(cells, *args.compare), end="")
        if args.against_all:
            print(against_all(cells, args.against_all), end="")
        if args.report:
            _write_report(measured, args)
        return
    if (args.artefact is None) == (args.model is None):
        raise ConfigError("give one of ARTEFACT and --model: see --help")
    sweep = _sweep(args)
    subject, writer = _artefact(args) if args.artefact is not None else _model(args)
    results = ResultFile(args.output)
    _run(sweep, subject, writer, results, args)


def _run(sweep: Sweep, subject: Subject, writer: SampleWriter, results: ResultFile, args: argparse.Namespace) -> None:
    from trimkv_edge.evaluation.sweep import run_sweep

    if args.force:
        results.cells.clear()
    tokens = sum(length * sweep.samples for _, length, *_ in sweep.cells())
    with tqdm(total=tokens, unit="tok", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def report(line: str) -> None:
            with bar.external_write_mode(file=sys.stdout):
                print(line, flush=True)

        def progress(tokens: int) -> None:
            bar.update(tokens)

        cells = run_sweep(sweep, subject, writer, results, report, progress)
    _write_report(cells, args)


def _write_report(cells: list[Cell], args: argparse.Namespace) -> None:
    from trimkv_edge.evaluation.report import pooled, tables

    path = args.output / "tables.md"
    replace_text(path, tables(pooled(cells)))
    print(f"tables    {path}")
    if not args.no_plots:
        from trimkv_edge.evaluation.plots import plot_all

        files = plot_all(pooled(cells), args.output / "plots")
        print(f"plots     {len(files)} files in {args.output / 'plots'}")


def _sweep(args: argparse.Namespace) -> Sweep:
    from trimkv_edge.evaluation.methods import Method, parse_share
    from trimkv_edge.evaluation.sweep import Sweep

    if args.artefact is not None:
        if args.methods is not None:
            raise ConfigError("--methods is for --model: an artefact has the policy it was exported with")
        from trimkv_edge.manifest import load_manifest

        cache = load_manifest(args.artefact, verify_files=False).cache
        budgets = ((str(cache.budget), cache.budget),)
        return Sweep(
            tuple(args.tasks),
            tuple(args.lengths),
            budgets,
            (Method(cache.policy),),
            args.samples,
            cache.buffer,
            args.seed,
        )
    if args.engine is not None:
        raise ConfigError("--engine is for an artefact: --model runs in the eager engine")
    return Sweep(
        tuple(args.tasks),
        tuple(args.lengths),
        tuple((text, parse_share(text)) for text in args.budgets),
        tuple(Method.parse(text) for text in args.methods or _METHODS),
        args.samples,
        args.buffer,
        args.seed,
        args.lookahead,
    )


def _filler(args: argparse.Namespace) -> list[str]:
    if args.text is None:
        from trimkv_edge.models.tiny.corpus import stdlib_texts

        return list(stdlib_texts(held_out=True))
    texts = []
    for path in args.text:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text {path} cannot be read as UTF-8 text ({error})") from error
    return texts


def _artefact(args: argparse.Namespace) -> tuple[Subject, SampleWriter]:
    from trimkv_edge.errors import ArtefactError
    from trimkv_edge.evaluation.reader import EngineReader
    from trimkv_edge.evaluation.samples import SampleWriter
    from trimkv_edge.evaluation.sweep import Subject
    from trimkv_edge.evaluation.words import WORDS
    from trimkv_edge.manifest import MANIFEST_FILE, file_sha256
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.engines import load_engine

    artefact = Artefact.load(args.artefact)
    if artefact.tokenizer is None:
        raise ArtefactError(f"{artefact.folder} has no tokenizer (random weights have none): nothing can be asked")
    engine = load_engine(artefact, args.engine, args.threads)
    subject = Subject(
        model=f"{artefact.manifest.model.name} {file_sha256(artefact.folder / MANIFEST_FILE)[:12]}",
        engine=engine.name,
        gates_of=lambda method: artefact.manifest.gates.sha256[:12],
        open=lambda method, config: EngineReader(engine),
    )
    return subject, SampleWriter(artefact.folder, WORDS, _filler(args), artefact.special_tokens())


def _model(args: argparse.Namespace) -> tuple[Subject, SampleWriter]:
    import torch

    from trimkv_edge.config import CacheConfig
    from trimkv_edge.errors import ModelError
    from trimkv_edge.evaluation.methods import Method
    from trimkv_edge.evaluation.reader import EagerReader, Reader
    from trimkv_edge.evaluation.samples import SampleWriter
    from trimkv_edge.evaluation.sweep import Subject
    from trimkv_edge.evaluation.words import WORDS
    from trimkv_edge.eviction import find_policy
    from trimkv_edge.models.loading import LoadedModel, load_model
    from trimkv_edge.models.source import find_source

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    source = find_source(args.model, args.weights)
    if source.folder is None:
        raise ModelError(f"{args.model} has no weights here: give --weights DIR")
    loaded: dict[str | None, LoadedModel] = {}

    def load(method: Method) -> LoadedModel:
        if method.gates not in loaded:
            loaded.clear()  # one base in memory at a time
            loaded[method.gates] = load_model(source, method.gates)
        return loaded[method.gates]

    def gates_of(method: Method) -> str:
        return load(method).gates.sha256[:12] if "log_beta" in find_policy(method.policy).reads else ""

    def open_reader(method: Method, config: CacheConfig) -> Reader:
        return EagerReader(load(method).model, config, args.batch)

    subject = Subject(f"{source.name} {source.weights_sha256()[:12]}", "eager", gates_of, open_reader)
    tokens = {name: getattr(source.config, f"{name}_id", None) for name in ("bos_token", "eos_token")}
    writer = SampleWriter(source.folder, WORDS, _filler(args))
    writer.set_special({name: token for name, token in tokens.items() if isinstance(token, int)})
    return subject, writer


if __name__ == "__main__":
    main()
