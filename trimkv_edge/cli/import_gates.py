"""``trimkv-import-gates``: published retention gates, checked and written as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from trimkv_edge.cli.common import quiet_libraries, run_cli

_EXAMPLES = """examples:
  trimkv-import-gates ngocbh/TrimKV-Qwen3-4B-Math -o qwen3-gates
  trimkv-import-gates ./downloaded --model ./Qwen3-4B -o qwen3-gates   (checks the fit, records the weights' hash)
  trimkv-import-gates trimkv_weights.pth --config config.json -o qwen3-gates
then: trimkv-export --model qwen3-4b --gates qwen3-gates --budget 1024 ...
A .pth is a pickle; it is read without running any code in it. Exit codes: 0 done, 2 wrong input."""


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="trimkv-import-gates",
        description="Check published retention gates and write them as safetensors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="hub id (owner/name), folder, .pth or .safetensors file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new folder for the gates")
    parser.add_argument("--model", metavar="NAME|DIR", help="base model to check against; records its weights' hash")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the gates' config.json (default: beside the file)")
    parser.add_argument(
        "--tied-copy",
        choices=("refuse", "first", "last"),
        default="refuse",
        help="rg10 shares its last projection; if the stored copies differ: stop (default), or take this layer's",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing folder of gates")
    args = parser.parse_args(argv)
    run_cli(lambda: _import(args))


def _import(args: argparse.Namespace) -> None:
    quiet_libraries()
    from trimkv_edge.models.gate_source import import_gates
    from trimkv_edge.models.gates import GateShape
    from trimkv_edge.models.source import find_source

    model = find_source(args.model, vision=True) if args.model else None
    result = import_gates(
        args.source,
        args.output,
        config=args.config,
        shape=GateShape.of(model.config) if model else None,
        base_sha256=model.weights_sha256() if model else None,
        tied_copy=args.tied_copy,
        force=args.force,
    )
    info = result.info
    print(
        f"gates     {info['kind']}, {info['num_layers']} layers x {info['num_kv_heads']} KV heads, "
        f"width {info['intermediate_size']}, {info['dtype']}"
    )
    print(f"for       {info['base_model'] or 'unnamed base model'}, trained with M = {info['memory']}")
    print(f"source    sha256 {info['source']['sha256']}")
    print(f"made      {result.folder}")
    if model and model.family.vision:
        print("use it    from Python (docs/models.md): no command runs models that read pictures yet")
    else:
        print(f"use it    trimkv-export --model MODEL --gates {result.folder} --budget {info['memory'] or 1024} -o OUT")


if __name__ == "__main__":
    main()
