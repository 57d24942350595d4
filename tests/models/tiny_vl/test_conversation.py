"""A long conversation with pictures in bounded memory: the model's own answers, token by token."""

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.tiny_vl import conversation, evaluate
from trimkv_edge.models.vision_engine import vision_engine


def test_answers_stay_right_while_old_things_leave() -> None:
    budget, buffer = 32, 32
    model = evaluate.load("rg10-chat")
    settings = {
        "gates": CacheConfig(budget, buffer, 32, "global"),
        "window": CacheConfig(budget, buffer, 32, "streaming", sinks=4),
    }
    results = {name: conversation.run(vision_engine(model, config), 3, 12, 40) for name, config in settings.items()}
    for result in results.values():
        assert result["most_entries"] <= (budget + buffer) * 8
        assert result["tokens"] > 2000
        assert result["picture question"]["asked"] == result["text question"]["asked"] == 12
    kinds = conversation.QUESTIONS
    assert sum(results["gates"][kind]["right"] for kind in kinds) >= 19
    assert sum(results["window"][kind]["right"] for kind in kinds) <= 6
