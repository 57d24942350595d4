"""A bounded cache in lm-evaluation-harness: all of its tasks, on an exported artefact or on a model.

``trimkv-lm-eval`` is ``lm_eval`` with one more model, ``trimkv``. (The harness has no entry
points for models, so its own command cannot find one that is installed beside it.) From Python, importing
:mod:`trimkv_edge.evaluation.harness_model` registers the model.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise

from trimkv_edge.errors import TrimKVError

_HELP = """\
usage: trimkv-lm-eval --model trimkv --model_args ... --tasks ... [options of lm_eval]

lm-evaluation-harness over a cache of fixed size. Everything but the model is lm_eval's own: see `lm_eval run --help`.

examples:
  trimkv-lm-eval --model trimkv --model_args artefact=artefacts/qwen3-4b,engine=onnx \\
      --tasks gsm8k_cot_zeroshot --apply_chat_template --output_path results
  trimkv-lm-eval --model trimkv --model_args model=qwen3-4b,weights=./Qwen3-4B,budget=512 \\
      --tasks aime24 --gen_kwargs do_sample=true,temperature=0.6,top_p=0.95
  trimkv-lm-eval --model trimkv --tasks wikitext \\
      --model_args model=qwen3-4b,weights=./Qwen3-4B,policy=streaming,budget=512      a baseline

--model_args:
  artefact=DIR   what trimkv-export made; engine=onnx|executorch, threads=N
  model=NAME     a known name, a hub id or a folder, in the eager engine; weights=DIR, gates=KIND|HUB-ID|DIR|FILE,
                 rope=, policy=, budget=N|SIZE (512), buffer=N (128), prefill_chunk=N, sinks=N, recent=N, lookahead=N,
                 min_per_head=N, threshold=ALPHA (policies global and layer), threads=N
  both           seed=N (0) of sampling, enable_thinking=true|false for chat templates that know it

Contexts are never truncated: a stream of any length is read in chunks, and the policy decides what stays.
"""


def _on_cpu(argv: list[str]) -> list[str]:
    """lm_eval asks for a GPU unless told otherwise; what the user says, here or in a file, is left alone."""
    options = {arg.partition("=")[0] for arg in argv}
    ours = "--model=trimkv" in argv or any(
        option in ("--model", "-M") and value == "trimkv" for option, value in pairwise(argv)
    )
    return argv if not ours or options & {"--device", "--config", "-C"} else [*argv, "--device", "cpu"]


def main() -> None:
    """``lm_eval`` with the model ``trimkv``; exit code 2 for input that cannot be used."""
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(_HELP, end="")
        return
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"error: lm-eval is not installed ({error}): pip install 'trimkv-edge[eval]'", file=sys.stderr)
        sys.exit(2)
    import trimkv_edge.evaluation.harness_model  # noqa: F401  registers the model

    sys.argv = _on_cpu(sys.argv)
    try:
        cli_evaluate()
    except TrimKVError as error:
        if os.environ.get("TRIMKV_DEBUG", "") not in ("", "0"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
