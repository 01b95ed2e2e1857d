"""`engrammar explore`: a page that shows what a memory knows. Imports are inside the function, as in `main.py`."""

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from engrammar_cli.extras import require


def explore(
    what: Positional[tuple[str, ...]],
    /,
    adapter: Path | None = None,
    patch: tuple[Path, ...] = (),
    memory: Literal["weights", "ram", "disk"] = "weights",
    cache_rows: int = 0,
    census: Path | None = None,
    export: Path | None = None,
    text: str = "",
    host: str = "127.0.0.1",
    port: int = 8765,
    max_tokens: int = 512,
    max_ngrams: int = 1_000_000,
    cache: Path = Path("~/.cache/engrammar"),
    no_cache: bool = False,
) -> None:
    """Look into a model in a browser: gates, guesses with and without memory, n-grams and their rows, facts to change.

    Args:
        what: MODEL, a folder or a name on the Hub. Or: census CORPUS MODEL, which counts the n-grams of a text and
            writes to --census which of them share rows.
        adapter: The folder of a memory that was attached to the model.
        patch: Files of patches to apply.
        memory: Where the memory's tables are: weights of the model, their stored bytes in RAM, or on disk.
        cache_rows: Rows of each table kept in RAM in front of the disk.
        census: A census file of the model's memory.
        export: Write one HTML file about --text, which opens without a server, and stop.
        text: The text of the exported page.
        host: Where to listen. Other machines can reach anything but 127.0.0.1, and the token alone keeps them out.
        port: Where to listen; 0 takes a free port.
        max_tokens: Longer texts are refused.
        max_ngrams: N-grams of each order that a census keeps, the most frequent ones.
        cache: Folder in which what is read for all facts alike is kept for the next time, as by `engrammar edit learn`.
        no_cache: Keep nothing there and read it anew.
    """
    if len(what) not in (1, 3) or (len(what) == 3 and what[0] != "census"):
        raise ValueError("engrammar explore needs MODEL, or: census CORPUS MODEL.")
    require("explore")
    from engrammar_explore.opening import Source

    model = what[-1]
    where: dict[str, Any] = {"memory": memory, "cache_rows": cache_rows, "census": census}
    kept = None if no_cache else cache.expanduser()
    source = Source(model=model, adapter=adapter, patches=patch, kept=kept, **where)
    if len(what) == 3:
        if census is None:
            raise ValueError("engrammar explore census needs --census, the file to write.")
        _count(source, what[1], census, max_ngrams)
    else:
        _open(source, export, text, host, port, max_tokens)


def _count(source: Any, corpus: str, out: Path, max_ngrams: int) -> None:
    from engrammar_explore.census import CensusSettings, build_census
    from engrammar_explore.opening import memory_in, open_model

    model, tokenizer = open_model(source)
    about = build_census(memory_in(model), tokenizer, corpus, out, CensusSettings(most_ngrams=max_ngrams))
    forgotten = ", ".join(f"{number:,} {order}-grams" for order, number in about["forgotten"].items() if number)
    print(f"{out}: {about['tokens']:,} tokens of {corpus}, {out.stat().st_size:,} bytes")
    if forgotten:
        print(f"forgotten on the way, the rarest first: {forgotten}; more --max-ngrams keep more")


def _open(source: Any, export: Path | None, text: str, host: str, port: int, max_tokens: int) -> None:
    from engrammar_explore.export import export_page
    from engrammar_explore.looking import LookSettings
    from engrammar_explore.opening import open_session
    from engrammar_explore.serving import Server

    settings = LookSettings(most_tokens=max_tokens)
    if export is not None:
        if not text:
            raise ValueError("--export needs --text, the text of the page.")
        export_page(open_session(source, settings).whole(text, "first"), export)
        print(f"{export}: {export.stat().st_size:,} bytes")
        return
    session = open_session(source, settings)
    server = Server(session, host, port)
    print(f"Open {server.url}\nOnly this link can change anything. Ctrl+C ends.", flush=True)
    server.run()
