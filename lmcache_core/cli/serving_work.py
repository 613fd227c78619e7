"""Workloads of `bench serving`, and the closed loop that sends them: who asks what, in which order, with what history.

Every session has a history of token ids. A step asks one question: its prompt is the history and the question. In a
conversation the history grows by both and the answer. At most `concurrency` steps are in flight, and begin in the
order of the workload, so that every system sees the same arrivals; how fast they come is what is measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

from lmcache_core.errors import LMCacheError

QUESTIONS = (
    "What does the text above say first?",
    "Who is named in the text above, and why?",
    "What may not be done, and by whom?",
    "How long do the persons named above serve?",
    "Which words of the text above are the most important?",
    "What happens when they do not agree?",
)

Ask = Callable[[Sequence[int], int], tuple[float, list[int]]]
"""Completes a prompt with as many tokens as asked for: seconds to the first of them, and their ids."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is served."""

    sessions: int
    """Users, or documents."""
    turns: int
    """Questions of each, after the warm-up."""
    tokens: int
    """Tokens of each user's text, or of each document."""
    rounds: int
    answer: int = 24
    concurrency: int = 2
    unique_prompts: int = 4
    """Prompts of one round without reuse, of `unique_tokens` tokens each."""
    unique_tokens: int = 1024
    unique_rounds: int = 6


@dataclass(frozen=True, slots=True)
class Step:
    """One question of one session, as token ids."""

    session: int
    question: list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. The first `warm_up` steps are answered before the others begin, and are not measured."""

    histories: list[list[int]]
    steps: list[Step]
    answer: int
    """Tokens of each answer."""
    concurrency: int
    grows: bool = False
    """Whether questions and answers become part of the history."""
    warm_up: int = 0

    def working_set(self) -> int:
        """Tokens of all histories at their longest."""
        return sum(self._longest(session) for session in range(len(self.histories)))

    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(self._longest(session) for session in range(len(self.histories)))

    def _longest(self, session: int) -> int:
        asked = [len(step.question) + self.answer for step in self.steps if step.session == session]
        return len(self.histories[session]) + (sum(asked) if self.grows else max(asked))


@dataclass(frozen=True, slots=True)
class Served:
    """What one system made of one workload: the measured steps in order."""

    ttft_s: list[float]
    answers: list[list[int]]
    seconds: float
    """From the first request to the last token."""

    @property
    def tokens_s(self) -> float:
        """Generated tokens per second."""
        return sum(map(len, self.answers)) / self.seconds


class Texts:
    """Token ids of different texts, each cut from the same document behind a heading that no other has, so that no two
    of them share a prefix."""

    def __init__(self, encode: Callable[[str], list[int]], document: str, seed: int) -> None:
        self._encode = encode
        self._ids = encode(document)
        if not self._ids:
            raise LMCacheError("the document has no tokens for this model; pass a longer one with --document FILE")
        self._random = Random(seed)
        self._questions = [encode(f"\n\nQuestion: {question}\nAnswer:") for question in QUESTIONS]

    def new(self, length: int) -> list[int]:
        """The next text, `length` tokens with its heading."""
        heading = self._encode(f"Document {self._random.getrandbits(48):012x}\n\n")
        begin = self._random.randrange(len(self._ids))
        ids = self._ids[begin:] + self._ids * (length // len(self._ids) + 1)
        return (heading + ids)[:length]

    def question(self, number: int) -> list[int]:
        """One of the questions."""
        return list(self._questions[number % len(self._questions)])

    def shuffled(self, items: Iterable[int]) -> list[int]:
        """The items in another order."""
        return self._random.sample(listed := list(items), len(listed))


def multi_round_qa(texts: Texts, scale: Scale) -> Workload:
    """Conversations about a text of each user's own; users take turns in changing order."""
    users = range(scale.sessions)
    steps = [Step(user, texts.question(turn)) for turn in range(scale.turns) for user in texts.shuffled(users)]
    return Workload([texts.new(scale.tokens) for _ in users], steps, scale.answer, scale.concurrency, grows=True)


def long_doc_qa(texts: Texts, scale: Scale) -> Workload:
    """Each document is asked about once, as a warm-up, and then again with other questions, all shuffled."""
    documents = range(scale.sessions)
    warm = [Step(document, texts.question(0)) for document in documents]
    order = texts.shuffled(range(scale.sessions * scale.turns))
    steps = [Step(at % scale.sessions, texts.question(1 + at // scale.sessions)) for at in order]
    histories = [texts.new(scale.tokens) for _ in documents]
    return Workload(histories, warm + steps, scale.answer, scale.concurrency, warm_up=scale.sessions)


def no_reuse(texts: Texts, scale: Scale) -> Workload:
    """Prompts that share nothing."""
    prompts = range(scale.unique_prompts)
    steps = [Step(number, texts.question(number)) for number in prompts]
    return Workload([texts.new(scale.unique_tokens) for _ in prompts], steps, scale.answer, scale.concurrency)


def serve(workload: Workload, ask: Ask) -> Served:
    """Send the workload."""
    histories = [list(history) for history in workload.histories]
    last: dict[int, Future[tuple[float, list[int]]]] = {}

    def answer(step: Step, before: Future[tuple[float, list[int]]] | None) -> tuple[float, list[int]]:
        if before is not None:
            before.result()
        prompt = histories[step.session] + step.question
        ttft, tokens = ask(prompt, workload.answer)
        if workload.grows:
            histories[step.session] = prompt + tokens
        return ttft, tokens

    pool = ThreadPoolExecutor(workload.concurrency)

    def run(steps: Sequence[Step]) -> list[tuple[float, list[int]]]:
        futures = []
        for step in steps:
            # Threads take steps in order, so the one waited for has begun, and waiting cannot last for ever.
            future = pool.submit(answer, step, last.get(step.session) if workload.grows else None)
            last[step.session] = future
            futures.append(future)
        return [future.result() for future in futures]

    try:
        run(workload.steps[: workload.warm_up])
        begun = time.perf_counter()
        done = run(workload.steps[workload.warm_up :])
        seconds = time.perf_counter() - begun
    finally:
        # Whoever interrupts waits for nobody: requests in flight end with the servers.
        pool.shutdown(wait=False, cancel_futures=True)
    return Served([ttft for ttft, _ in done], [tokens for _, tokens in done], seconds)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def summary(served: Sequence[Served]) -> dict[str, float]:
    """The figures of one system over its rounds."""
    ttfts = [ttft for round_ in served for ttft in round_.ttft_s]
    return {
        "ttft_p50_s": round(statistics.median(ttfts), 4),
        "ttft_p95_s": round(percentile(ttfts, 95), 4),
        "tokens_s": round(sum(len(a) for r in served for a in r.answers) / sum(r.seconds for r in served), 2),
    }


def overhead(rates: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """Share of the control's rate that is lost, from the median of the ratios round by round; negative: gained.

    And its standard error, from the median deviation (1.4826 of it is a Gaussian's sigma, whose median is 1.2533 times
    as uncertain as its mean): what a machine does to a few rounds only counts for neither.
    """
    ratios = [mine / theirs for mine, theirs in zip(rates, control, strict=True)]
    middle = statistics.median(ratios)
    deviation = statistics.median(abs(ratio - middle) for ratio in ratios)
    return round(1 - middle, 4), round(1.2533 * 1.4826 * deviation / math.sqrt(len(ratios)), 4)


def differing(answers: Sequence[Served], control: Sequence[Served]) -> int:
    """Answers whose token ids are not the control's."""
    pairs = zip(answers, control, strict=True)
    return sum(mine != theirs for a, b in pairs for mine, theirs in zip(a.answers, b.answers, strict=True))
