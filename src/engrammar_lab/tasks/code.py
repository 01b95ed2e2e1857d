"""Completion of Python functions: the next line is chosen among real lines, or produced exactly."""

import ast
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engrammar_lab.tasks.questions import SPLITS, Document, Question, Split, count_tokens, exact, pose

LINE_LENGTHS = range(12, 81)  # of the line that is asked for, in characters without indentation
NUM_BEFORE = 3  # lines of the function, its head included, that precede the line that is asked for


@dataclass(frozen=True, kw_only=True)
class Line:
    """A simple statement on one line inside a function; `number` counts the file's lines from 0."""

    number: int
    text: str
    function: int  # line of the function's head
    document: int

    @property
    def indentation(self) -> int:
        return len(self.text) - len(self.text.lstrip())


def function_lines(source: str, document: int = 0) -> list[Line]:
    """The lines of a file that can be asked for; none if the file is not valid Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sources have deprecated escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.split("\n")
    found = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if not isinstance(node, ast.stmt) or node.lineno != node.end_lineno:
                    continue
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    continue  # a docstring
                number = node.lineno - 1
                text = lines[number].rstrip()
                whole = text.strip().encode() == text.encode()[node.col_offset : node.end_col_offset]
                if whole and len(text.strip()) in LINE_LENGTHS and number - function.lineno + 1 >= NUM_BEFORE:
                    found[number] = Line(number=number, text=text, function=function.lineno, document=document)
    return list(found.values())


def code_questions(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, num: int, seed: int
) -> dict[str, list[Question]]:
    """Up to `num` questions for each of code/{choice,exact}/{seen,unseen}, within `length` tokens.

    The questions are on as many files as possible. Context: the lines of the file before the one asked for, as many as
    fit. Choices: the line, and three of equal indentation from other functions of the same split that are not in the
    context.
    """
    found: dict[str, list[Question]] = {}
    for split in SPLITS:
        own = [document.text for document in documents if document.split == split]
        choice = _choices(own, split, tokenizer, length, num, random.Random(f"code {split} {seed}"))
        found[f"code/choice/{split}"] = choice
        found[f"code/exact/{split}"] = [exact(question, f"code/exact/{split}") for question in choice]
    return found


def _choices(
    sources: Sequence[str],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    num: int,
    rng: random.Random,
) -> list[Question]:
    order = rng.sample(range(len(sources)), len(sources))[: 2 * num]  # parsing takes most of the time
    files = [lines for index in order if (lines := function_lines(sources[index], index))]
    pools: dict[int, list[Line]] = {}
    for lines in files:
        rng.shuffle(lines)
        for line in lines:
            pools.setdefault(line.indentation, []).append(line)
    questions: list[Question] = []
    for turn in range(max(map(len, files), default=0)):
        for lines in files:
            if turn < len(lines) and len(questions) < num:
                pool = pools[lines[turn].indentation]
                question = _question(lines[turn], sources[lines[turn].document], pool, split, tokenizer, length, rng)
                if question is not None:
                    questions.append(question)
        if len(questions) == num:
            break
    return questions


def _question(
    line: Line,
    source: str,
    pool: Sequence[Line],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rng: random.Random,
) -> Question | None:
    others: dict[str, None] = {}
    for other in rng.sample(pool, min(len(pool), 12)):
        elsewhere = (other.document, other.function) != (line.document, line.function)
        if elsewhere and other.text != line.text and len(others) < 3:
            others[other.text] = None
    right, wrong = f"\n{line.text}", [f"\n{other}" for other in others]
    room = length - 1 - max(count_tokens(tokenizer, [right, *wrong]))
    context = _last_lines(source.split("\n")[: line.number], tokenizer, room)
    told = any(choice.strip() in context for choice in (right, *wrong))
    if told or len(wrong) < 3 or context.count("\n") < NUM_BEFORE - 1:
        return None
    return pose(rng, context=context, right=right, wrong=wrong, task=f"code/choice/{split}", split=split)


def _last_lines(lines: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> str:
    """The last whole lines that take at most `num_tokens` tokens."""
    near = lines[-num_tokens:] if num_tokens > 0 else []
    kept = 0
    for num in reversed(count_tokens(tokenizer, [f"{line}\n" for line in near])):
        num_tokens -= num
        if num_tokens < 0:
            break
        kept += 1
    return "\n".join(near[len(near) - kept :])
