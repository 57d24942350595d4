"""The tasks: one file per kind, one line per task."""

from trimkv_edge.evaluation.tasks.aggregate import COMMON_WORDS, FREQUENT_WORDS, VARIABLES
from trimkv_edge.evaluation.tasks.base import Task
from trimkv_edge.evaluation.tasks.dialogue import DIALOGUE, UPDATES
from trimkv_edge.evaluation.tasks.facts import MULTI_KEY, MULTI_QUERY, MULTI_VALUE, SINGLE
from trimkv_edge.evaluation.tasks.qa import QA
from trimkv_edge.evaluation.tasks.text import TEXT

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SINGLE,
        MULTI_KEY,
        MULTI_QUERY,
        MULTI_VALUE,
        UPDATES,
        DIALOGUE,
        VARIABLES,
        FREQUENT_WORDS,
        COMMON_WORDS,
        QA,
        TEXT,
    )
}

__all__ = ["TASKS", "Task"]
