"""Conversations with marked answers and open places for filler: what a task writes, before any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

# Private-use characters: they pass through chat templates unchanged and occur in no word list.
ANSWER_OPEN, ANSWER_CLOSE, FILLER = "\ue000", "\ue001", "\ue002"


@dataclass
class Conversation:
    """User and assistant messages, oldest first.

    Attributes:
        messages: (role, content); contents hold the marks above.
        groups: label of each answer, in order, for tables that split a task.
    """

    messages: list[tuple[str, str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def say(self, user: str, assistant: str) -> None:
        """One exchange without a question."""
        self.messages += [("user", user), ("assistant", assistant)]

    def tell(self, facts: dict[str, str], update: bool = False) -> None:
        """States ``the KEY is VALUE`` for each fact."""
        body = "; ".join(f"the {key} is {value}" for key, value in facts.items())
        self.say(f"{'Update' if update else 'Remember'}: {body}.", "Noted.")

    def read(self) -> None:
        """A piece of text that nobody asks about; its length makes the stream as long as it has to be."""
        self.say(f"Read this:\n{FILLER}", "Noted.")

    def ask(self, question: str, before: str, answer: str, group: str = "") -> None:
        """A question whose reply is ``before + answer + '.'``; only the answer counts."""
        self.say(question, f"{before}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}.")
        self.groups.append(group)

    def recall(self, key: str, value: str, group: str = "") -> None:
        """Asks for the value of a key."""
        self.ask(f"What is the {key}?", f"The {key} is ", value, group)
