"""`engrammar serve` and `engrammar vllm`: serving a model. Imports are inside the functions, as in `main.py`."""

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from engrammar_cli.extras import require


def serve(
    model: Positional[str],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_name: str | None = None,
    memory: Literal["ram", "disk", "remote"] = "ram",
    cache_rows: int = 0,
    sharing: Literal["none", "processes"] = "none",
    name: str | None = None,
    address: str = "127.0.0.1:50051",
    device: str = "cpu",
    adapter: Path | None = None,
    patch: tuple[Path, ...] = (),
    patch_on_request: tuple[Path, ...] = (),
    max_length: int | None = None,
    max_requests: int = 256,
    cache_tokens: int = 8192,
    batch_tokens: int = 512,
    token_file: Path | None = None,
) -> None:
    """Serve a model behind OpenAI's API: completions, chat, streaming, many clients at once.

    Args:
        model: A folder, or a name on the Hub: of ours, or of any causal language model.
        host: Address to listen at.
        port: Port to listen at.
        served_name: Name of the model in requests; by default as given.
        memory: Where the memory's tables are: in RAM, on disk, or in a Mooncake pool of other machines.
        cache_rows: Rows of each table kept in RAM in front of the disk or the pool.
        sharing: processes: servers of one machine use one copy of the tables, and one cache.
        name: Name that the tables were uploaded under, for --memory remote.
        address: Address of mooncake_master, as HOST:PORT, for --memory remote.
        device: Where the model runs: cpu, or an accelerator by torch's name (cuda), on which nobody has tried it yet.
        adapter: The folder of a memory that was attached to the model; --memory says where its tables are.
        patch: Files of patches to apply, for all requests.
        patch_on_request: Files of patches that are applied for the requests that name them ("patches": [NAME, ...]).
        max_length: Tokens of a prompt and its answer; by default what the model was made for, and the cache keeps.
        max_requests: Answers under way or waiting; more are refused.
        cache_tokens: Positions that are kept of all requests together.
        batch_tokens: Tokens of one pass.
        token_file: A file with a token. Whoever has it may apply and undo patches; without it nobody may.
    """
    require("serve")
    from engrammar.serve.openai.asked import Limits
    from engrammar.serve.openai.engine import Engine
    from engrammar.serve.openai.loading import load_served, read_token, with_kept
    from engrammar.serve.openai.server import Server, run
    from engrammar.train.sample import pool_store

    if (memory == "remote") != (name is not None):
        raise ValueError("--memory remote and --name go together: name the tables as `engrammar table upload` did.")
    token = read_token(token_file)
    where: Any = memory if name is None else pool_store(adapter or Path(model), name, address)
    serving = {"memory": where, "cache_rows": cache_rows, "sharing": sharing}
    patch = with_kept(model, patch)
    loaded = load_served(model, adapter=adapter, patches=patch, on_request=patch_on_request, device=device, **serving)
    sizes = {"max_requests": max_requests, "cache_tokens": cache_tokens, "batch_tokens": batch_tokens}
    engine = Engine(*loaded, Limits(max_length=_longest(max_length, loaded[0].config, cache_tokens), **sizes))
    run(Server(engine, served_name or model, token), host, port)


def _longest(given: int | None, config: Any, cache_tokens: int) -> int:
    """Tokens of a prompt and its answer: as many as are given, or what the model was made for and the cache keeps."""
    return min(getattr(config, "max_position_embeddings", cache_tokens), cache_tokens) if given is None else given


def vllm(model: Positional[str], /, out: Path, adapter: Path | None = None, patch: tuple[Path, ...] = ()) -> None:
    """Write a folder from which vLLM serves a model with an attached memory, or patches. It holds links, no copies.

    Args:
        model: The folder, or the name on the Hub, of the model that the memory was attached to, or patches are for.
        out: The folder to write.
        adapter: The folder of the memory.
        patch: Files of patches.
    """
    from engrammar.serve.folder import link_folder

    link_folder(model, adapter, out, patch)
    print(f"{out}: serve it with python -m vllm.entrypoints.openai.api_server --model {out}")
