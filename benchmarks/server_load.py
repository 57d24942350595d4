"""64 clients talk with one server: does any answer get lost or come to the wrong client, and does memory grow?

    python benchmarks/server_load.py                                       # about 10 minutes
    python benchmarks/server_load.py --sessions 16 --turns 30 --state-dir  # more chats than sessions

``trimkv-serve`` runs in a process of its own over ``tiny``. Each client has values that no other client has, states
facts, asks for them, and now and then goes away in the middle of an answer and asks again. What it is told has to be,
word for word, what the same turns say in a session without a server; a value of another client is counted besides.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from common import exported, median, parser, save

from trimkv_edge.models.tiny.words import KEYS, VALUES
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session

_TOKENS = 12


class Turn(NamedTuple):
    """What a client says, the value it asks for if it does, and whether it goes away once."""

    text: str
    value: str | None
    leaves: bool


def script(client: int, args: Any) -> list[Turn]:
    """A client's turns; values are its own."""
    rng = random.Random(f"{args.seed} {client}")
    share = len(VALUES) // args.clients
    own = VALUES[client * share : (client + 1) * share]
    facts: dict[str, str] = {}
    turns = []
    for number in range(args.turns):
        if number % args.restart == 0:
            facts.clear()
        leaves = rng.random() < args.leave
        if number % 2 == 0:
            key = rng.choice(KEYS[:6])
            word = "Update" if key in facts else "Remember"
            facts[key] = rng.choice(own)
            turns.append(Turn(f"{word}: the {key} is {facts[key]}.", None, leaves))
        else:
            key = rng.choice(list(facts))
            turns.append(Turn(f"What is the {key}?", facts[key], leaves))
    return turns


class Client:
    """One conversation over HTTP; keeps what it was told."""

    def __init__(
        self, number: int, turns: list[Turn], http: httpx.AsyncClient, model: str, seed: int, restart: int
    ) -> None:
        self.turns, self.answers = turns, list[str]()
        self._number, self._restart = number, restart
        self.seconds: list[float] = []
        self.count: Counter[str] = Counter()
        self._http, self._model, self._rng = http, model, random.Random(f"leaving {seed} {number}")
        self._messages: list[dict[str, str]] = []

    async def talk(self) -> None:
        for index, turn in enumerate(self.turns):
            if index % self._restart == 0:
                self._messages.clear()
                self._name = f"client {self._number}, chat {index // self._restart}"
            self._messages.append({"role": "user", "content": turn.text})
            if turn.leaves:
                await self._ask(self._rng.randrange(4))
                self.count["left"] += 1
            started = time.perf_counter()
            while (answer := await self._ask(None)) is None:
                self.count["refused"] += 1
                await asyncio.sleep(self._rng.uniform(0.5, 1.5))
            self.seconds.append(time.perf_counter() - started)
            self.answers.append(answer)
            self._messages.append({"role": "assistant", "content": answer})

    async def _ask(self, leave_after: int | None) -> str | None:
        """The answer; None if the server is busy, or if the client leaves after so many parts."""
        body = {"model": self._model, "messages": self._messages, "max_tokens": _TOKENS, "stream": True}
        body |= {"conversation": self._name, "stream_options": {"include_usage": True}}
        said = []
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code == 503:
                return None
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                part = json.loads(line[6:])
                if "error" in part:
                    raise RuntimeError(part["error"]["message"])
                if leave_after is not None and len(said) >= leave_after:
                    return None
                if part["choices"]:
                    said.append(part["choices"][0]["delta"].get("content") or "")
                else:
                    self.count["again" if not part["usage"]["prompt_tokens_details"]["cached_tokens"] else "on"] += 1
        return "".join(said)


@contextmanager
def serving(folder: Path, args: Any) -> Iterator[tuple[str, psutil.Process]]:
    """The server's address and process; it has to end by itself when told to."""
    command = [sys.executable, "-m", "trimkv_edge.cli.serve", str(folder), "--port", "0", "--undo", str(args.undo)]
    command += ["--sessions", str(args.sessions), "--waiting", str(args.clients), "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as chats:
        if args.state_dir:
            command += ["--state-dir", chats, "--saved", str(args.clients)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("serving"))
            found = re.search(r"http://\S+(?=/v1)", line)
            assert found is not None
            yield found[0], psutil.Process(process.pid)
            process.terminate()
            assert process.wait(60) == 0, "the server did not end well"
        except Exception as error:
            error.add_note(f"the server's exit code is {process.poll()} (None: it runs)")
            raise
        finally:
            process.kill()


async def load(
    url: str, server: psutil.Process, model: str, args: Any
) -> tuple[list[Client], list[tuple[int, int]], int]:
    """All clients at the same time; the server's memory over time (all of it, and the copies that ``--undo`` holds),
    and sessions left busy at the end."""
    limits = httpx.Limits(max_connections=None)
    memory: list[tuple[int, int]] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        clients = [
            Client(number, script(number, args), http, model, args.seed, args.restart) for number in range(args.clients)
        ]

        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                found = re.search(r"^trimkv_undo_bytes (\S+)", (await http.get("/metrics")).text, re.MULTILINE)
                assert found is not None
                memory.append((server.memory_info().rss, int(float(found[1]))))
                done = sum(len(client.answers) for client in clients)
                print(f"\r{done} of {args.clients * args.turns} turns", end="", file=sys.stderr, flush=True)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client.talk() for client in clients))
        watcher.cancel()
        await asyncio.sleep(1)
        return clients, memory, int((await http.get("/healthz")).json()["busy"])


def expected(artefact: Artefact, turns: list[Turn], restart: int) -> list[str]:
    """What a session without a server says."""
    chat = Conversation.open(artefact, Session.open(artefact, "onnx", 1, checkpoints=0))
    answers = []
    for index, turn in enumerate(turns):
        if index % restart == 0:
            chat.reset()
        answers.append("".join(piece.text for piece in chat.ask(turn.text, _TOKENS)))
    return answers


def main() -> None:
    options = parser("many clients of one server, with tiny", "server_load")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--turns", type=int, default=200)
    options.add_argument("--restart", type=int, default=10**9, help="turns after which a client begins a new chat")
    options.add_argument("--sessions", type=int, default=64)
    options.add_argument("--undo", type=int, default=1)
    options.add_argument("--leave", type=float, default=0.05, help="share of turns in which the client goes away once")
    options.add_argument("--budget", default="128")
    options.add_argument("--state-dir", action="store_true", help="chats that no session holds go to disk")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    with exported(budget=args.budget, buffer=32, prefill_chunk=32, gates="rg", targets=("onnx",)) as folder:
        artefact = Artefact.load(folder)
        started = time.perf_counter()
        with serving(folder, args) as (url, process):
            clients, memory, busy = asyncio.run(load(url, process, folder.name, args))
        taken = time.perf_counter() - started
        count: Counter[str] = sum((client.count for client in clients), Counter())
        for number, client in enumerate(clients):
            share = len(VALUES) // args.clients
            others = set(VALUES) - set(VALUES[number * share : (number + 1) * share])
            alone = expected(artefact, client.turns, args.restart)
            for turn, answer, want in zip(client.turns, client.answers, alone, strict=True):
                count["wrong"] += answer != want
                # The model also makes values up, alike with and without a server.
                count["foreign"] += bool(set(re.findall(r"\w+", answer)) & others)
                count["foreign alone"] += bool(set(re.findall(r"\w+", want)) & others)
                count["asked"] += turn.value is not None
                count["right"] += turn.value is not None and turn.value in answer.split(" is ")[-1]
    seconds = sorted(second for client in clients for second in client.seconds)
    marks = [memory[min(len(memory) - 1, len(memory) * part // 10)] for part in range(1, 11)]
    result = {
        "clients": args.clients,
        "sessions": args.sessions,
        "turns": len(seconds),
        "turns_of_a_chat": min(args.turns, args.restart),
        "undo": args.undo,
        "state_dir": args.state_dir,
        "went_away": count["left"],
        "refused_busy": count["refused"],
        "turns_read_from_the_beginning": count["again"],
        "answers_unlike_a_session_without_a_server": count["wrong"],
        "answers_with_a_value_of_another_client": count["foreign"],
        "such_answers_without_a_server": count["foreign alone"],
        "recall": round(count["right"] / count["asked"], 4),
        "sessions_busy_at_the_end": busy,
        "seconds": round(taken, 1),
        "turns_per_s": round(len(seconds) / taken, 1),
        "ms_per_turn_median": round(1e3 * median(seconds), 1),
        "ms_per_turn_95": round(1e3 * seconds[int(0.95 * len(seconds))], 1),
        "rss_mib_by_tenths": [round(rss / 2**20, 1) for rss, _ in marks],
        "undo_mib_by_tenths": [round(copies / 2**20, 1) for _, copies in marks],
        "rss_without_undo_mib_by_tenths": [round((rss - copies) / 2**20, 1) for rss, copies in marks],
    }
    print("\n", json.dumps(result, indent=1), sep="")
    save(args.output, "server_load", [result])


if __name__ == "__main__":
    main()
