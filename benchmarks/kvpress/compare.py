"""Our policies against kvpress: same weights, same tokens, same budget; who stays.

    python benchmarks/kvpress/compare.py tests/policies/data/kvpress build/recordings/{tiny,qwen3,llama}

The recordings are made by record.py. A head counts as the same when all of its M survivors are; where it is not, the
gap is that of kvpress's own scores between who only they kept and who only we kept (float32 noise is near 1e-7).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from recording import PAIRS, Event, Recording, observed_scores, same_heads, shared
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from common import parser, save


def gap(event: Event, theirs: Tensor, scores: Tensor) -> float | None:
    """Largest gap over the heads that differ, relative to the range of the scores; None if none differs."""
    gaps = []
    for ours, wanted, row in zip(*(t.flatten(0, 1) for t in (event.kept, theirs, scores)), strict=True):
        only_ours, only_theirs = ours[~torch.isin(ours, wanted)], wanted[~torch.isin(wanted, ours)]
        if only_ours.numel():
            gaps.append(float((row[only_theirs].max() - row[only_ours].min()) / (row.max() - row.min())))
    return max(gaps, default=None)


def score_difference(event: Event, policy: str, theirs: Tensor, recording: Recording) -> float | None:
    """Largest difference of the scores, relative to their range; None where scores are only a rank."""
    settings, model = recording.about["settings"], recording.about["model"]
    if policy == "streaming":
        return None
    if policy == "h2o":
        ours = observed_scores(event, model["num_attention_heads"] // model["num_key_value_heads"])
    else:
        ours = event.scores
    # Both lift what is always kept above all else, each by a number of its own.
    scored = settings["tokens"] - {"snapkv": min(32, settings["budget"] // 2), "tova": 1}.get(policy, 0)
    ours, theirs = ours[..., :scored], theirs[..., :scored]
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def compare(recording: Recording) -> dict[str, Any]:
    model = recording.model()
    wanted = recording.tensors
    settings = recording.about["settings"]
    budget = settings["budget"]
    at_prompt_end = (settings["tokens"] - budget) // settings["buffer"] - 1
    layers, heads = wanted["keys"].shape[:2]
    rows: dict[str, Any] = {
        "kvpress": recording.about["versions"],
        "settings": settings,
        "heads": layers * heads,
        "largest_key_difference": float((recording.keys(model) - wanted["keys"]).abs().max()),
    }
    for policy, press in PAIRS.items():
        prompt, stream = recording.prompt(model, policy), recording.stream(model, policy)
        theirs = wanted[f"{press}/prompt"].long()
        ours = torch.stack([event.kept for event in stream])
        row = {
            "press": press,
            "prompt_same_heads": same_heads(prompt.kept, theirs),
            "prompt_shared": shared(prompt.kept, theirs),
            "prompt_gap": gap(prompt, theirs, wanted[f"{press}/scores"]),
            "score_difference": score_difference(prompt, policy, wanted[f"{press}/scores"], recording),
            "stream_same_heads": [
                same_heads(*pair) for pair in zip(ours, wanted[f"{press}/stream"].long(), strict=True)
            ],
            "stream_shared": shared(ours, wanted[f"{press}/stream"].long()),
            # Theirs once, at the end of the prompt; ours each B tokens up to there.
            "stream_shared_with_prompt": shared(ours[at_prompt_end], theirs),
        }
        if policy == "h2o":
            group = recording.about["model"]["num_attention_heads"] // heads
            best = observed_scores(prompt, group).topk(budget).indices.sort(-1).values
            row["prompt_same_heads_by_their_formula"] = same_heads(best, theirs)
        rows[policy] = row
    return rows


def main() -> None:
    options = parser("our policies against kvpress", "kvpress")
    options.add_argument("recordings", nargs="+", type=Path, help="files of record.py, without their endings")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for path in args.recordings:
        recording = Recording.load(path)
        results[recording.about["case"]] = compare(recording)
        for policy in PAIRS:
            print(recording.about["case"], policy, results[recording.about["case"]][policy], flush=True)
    save(args.output, "kvpress", results)


if __name__ == "__main__":
    main()
