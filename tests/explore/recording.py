"""A session with the explorer as one animated picture: a text, its gates, a fact, the changed answer, and back.

    engrammar explore MODEL --port 8765 &
    python tests/explore/recording.py 'http://127.0.0.1:8765/?token=...' session.gif

The model is left as it was. Pillow is in the extra `lab`.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from browser import browsing, open_page

SIZE = {"width": 1180, "height": 860}
SCALE, BAR, COLOURS, SECONDS = 0.8, 44, 64, 3.0
MOST_MINUTES = 40  # a large model on a busy machine


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is typed. `text` ends where the answer begins."""

    text: str = "The capital of France is"
    subject: str = "France"
    prompt: str = "The capital of France is"
    object: str = "Lyon"


def record(context, url: str, story: Story) -> list[tuple[str, bytes]]:
    """Goes through the story in a browser: what each picture shows, and its PNG."""
    page = open_page(context, url)
    page.set_default_timeout(MOST_MINUTES * 60_000)
    page.set_viewport_size(SIZE)
    seen: list[tuple[str, bytes]] = []

    def show(words: str, place: str) -> None:
        page.wait_for_selector("#strip:not(.stale)")
        page.wait_for_selector("body[data-asking='0']")
        page.eval_on_selector(place, "one => one.scrollIntoView({block: 'start'})")
        seen.append((words, page.screenshot()))

    page.fill("#text", story.text)
    while page.input_value("#text").split() != "".join(page.locator(".token").all_text_contents()).split():
        page.wait_for_timeout(50)
    show("Type a text", "body")
    page.locator(".token").last.click()
    page.wait_for_selector(".token:last-child[aria-pressed=true]")
    show("Read a token: its gates, and the next token with and without the memory", "body")
    for name in ("subject", "object", "prompt"):
        page.fill(f"#{name}", getattr(story, name))
    page.click("text=Try the fact")
    page.wait_for_selector("#tried .answer")
    name = page.locator("[data-patch]").last.get_attribute("data-patch")
    show("Write a fact: the answer before and after. Nothing is applied yet", "#facts")
    page.click(f"[aria-label='Apply {name}']")
    page.wait_for_selector(f"[aria-label='Undo {name}']")
    show("Apply it: the model now says so", "body")
    page.click(f"[aria-label='Undo {name}']")
    page.wait_for_selector(f"[aria-label='Apply {name}']")
    show("Undo: the model is what it was, to the bit", "body")
    page.click(f"[aria-label='Forget {name}']")
    page.wait_for_selector(f"[data-patch='{name}']", state="detached")
    assert not page.complaints, page.complaints
    page.close()
    return seen


def animate(seen: list[tuple[str, bytes]], path: Path) -> None:
    """Writes pictures with their words above them, one after another, for ever."""
    from PIL import Image, ImageDraw, ImageFont

    frames = []
    for number, (words, data) in enumerate(seen, 1):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        size = (round(picture.width * SCALE), round(picture.height * SCALE))
        frame = Image.new("RGB", (size[0], size[1] + BAR), "#0b6b58")
        frame.paste(picture.resize(size, Image.Resampling.LANCZOS), (0, BAR))
        ImageDraw.Draw(frame).text(
            (16, BAR // 2), f"{number}  {words}", fill="white", font=ImageFont.load_default(20), anchor="lm"
        )
        frames.append(frame.quantize(COLOURS, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(SECONDS * 1000), loop=0, optimize=True)


if __name__ == "__main__":
    with browsing() as opened:
        animate(record(opened, sys.argv[1], Story()), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {Path(sys.argv[2]).stat().st_size:,} bytes")
