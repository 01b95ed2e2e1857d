"""The forms in which a fact may be asked: a sentence that the object ends, a question, and a question in a chat.

A model's hidden states differ so much between them that each form has a probe of its own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

MARK = "?"  # what a question ends in
# Words of a question that leave what it asks as it is when they are exchanged.
SWAPS = (
    ("What", "Which"), ("Which", "What"), ("Who", "Which person"), ("Where", "In what place"), ("was", "is"),
    ("is", "was"), ("does", "did"), ("did", "does"),
)  # fmt: skip
BEFORE_QUESTION = ("Please tell me: ", "Do you know ")


def is_question(prompt: str) -> bool:
    return prompt.rstrip().endswith(MARK)


def reworded(prompt: str) -> list[str]:
    """A question in words that ask the same; nothing for what is no question."""
    if not is_question(prompt):
        return []
    swapped = (re.sub(rf"\b{one}\b", other, prompt, count=1) for one, other in SWAPS)
    return [
        *(one for one in swapped if one != prompt),
        *(words + prompt[0].lower() + prompt[1:] for words in BEFORE_QUESTION),
    ]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How something is asked."""

    name: str  # sentence, question or chat
    questions: bool  # whether prompts of this form are questions
    put: Callable[[str], str] = str  # a prompt -> the text that the model reads

    def fits(self, prompt: str) -> bool:
        return is_question(prompt) == self.questions

    @property
    def after(self) -> str:
        """What follows on a prompt."""
        return self.put(MARK).rpartition(MARK)[2]


def forms_of(tokenizer: PreTrainedTokenizerBase) -> Sequence[Form]:
    """The forms that a model reads: chats only if its tokenizer has a template for them."""
    forms = [Form(name="sentence", questions=False), Form(name="question", questions=True)]
    if tokenizer.chat_template:
        forms.append(Form(name="chat", questions=True, put=lambda prompt: in_chat(tokenizer, prompt)))
    return forms


def in_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What a chat model reads when a user asks something, up to where its answer begins.

    A token that the tokenizer puts before every text is left out: it comes when the text becomes ids.

    Raises:
        ValueError: the tokenizer has no template for chats.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template: ask without a chat, or use a model that was made for chats."
        )
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    first = tokenizer.bos_token
    doubled = first is not None and tokenizer(first).input_ids.count(tokenizer.bos_token_id) > 1
    return text.removeprefix(first) if doubled else text
