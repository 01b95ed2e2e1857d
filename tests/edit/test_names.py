"""Which ids begin a name, and that another name ends what a subject has armed."""

from edited_models import edited_model, spoken_ids
from engrammar.edit import lookup
from engrammar.edit.names import begins_name


def named(tokenizer, text: str) -> list[str]:
    """The words of a text that hold an id which begins a name."""
    names_V, found = begins_name(tokenizer), []
    for word in text.split():
        ids = tokenizer(" " + word, add_special_tokens=False).input_ids
        if any(names_V[one] for one in ids):
            found.append(word)
    return found


def test_words_with_a_capital_are_names_but_for_those_that_begin_sentences(v3_tokenizer):
    text = "Which city is the twin of Oslo? It is where Ada Lovelace, the Countess, met Mr Babbage. They were friends."
    assert named(v3_tokenizer, text) == ["Oslo?", "Ada", "Lovelace,", "Countess,", "Mr", "Babbage."]


def test_special_ids_are_no_names(v3_tokenizer):
    assert not begins_name(v3_tokenizer)[v3_tokenizer.all_special_ids].any()


def test_names_end_what_is_armed(monkeypatch):
    """The control for the twin in plain loops: without the rule other logits come out."""
    model, ids = edited_model("llama"), spoken_ids(3, 41)
    found = model(ids).logits
    monkeypatch.setattr(lookup, "_names_so_far", lambda stack, text: text.ids_BP * 0)
    assert (model(ids).logits - found).abs().max() > 1e-3
