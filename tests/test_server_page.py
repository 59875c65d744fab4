"""The page of `lama serve` in a browser, before a server of canned answers."""

import json
import re

import pytest
from browser import Browser, needs_chromium
from fake_server import ANSWER, END, FOLDER, HEADS, LAYERS, FakeServer

QUESTION = "Tell me about the cat."
SENT = f"<user>{QUESTION}\n"
HOSTILE = "<img src=x onerror='window.hit=1'> </p></script><script>window.hit=2</script> {{a}} \"'&amp;"


def source(name):
    return (FOLDER / name).read_text("utf-8")


def test_page_is_small_and_asks_for_nothing_from_elsewhere():
    files = {name: source(name) for name in ("page.html", "page.css", "page.js")}
    assert sum(len(text.encode()) for text in files.values()) < 45_000
    assert re.findall(r'(?:src|href)="([^"]*)"', files["page.html"]) == ["data:,", "page.css", "page.js"]
    assert not any(re.search(r"https?:|//\w+\.\w|@import|url\(", text) for text in files.values())


def test_page_has_no_way_for_markup_to_get_in():
    html, script = source("page.html"), source("page.js")
    assert not re.search(r"\bstyle=|\son\w+=|<style|<script(?! src=)|javascript:", html)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|setAttribute\(.style", script
    )


pytestmark = needs_chromium


@pytest.fixture(scope="module")
def server():
    with FakeServer() as opened:
        yield opened


@pytest.fixture(scope="module")
def chromium():
    with Browser() as opened:
        yield opened


@pytest.fixture
def browser(chromium, server):
    server.reset()
    yield chromium
    server.endless = False
    found = [each for each in chromium.complaints if not each.startswith(f"asked for {server.address}/")]
    expected = "Failed to load resource: the server responded with a status of [45]"
    assert [each for each in found if not re.match(expected, each)] == []


def open_page(browser, server, **about):
    browser.open(f"{server.address}/", **about)
    browser.run("sessionStorage.clear()")


def fill(browser, field, text):
    browser.run(f"document.querySelector({json.dumps(field)}).focus()")
    browser.type(text)


def answered(browser):
    browser.until("document.querySelector('.answer .token') && !document.querySelector('.busy')")


def chat(browser, text=QUESTION):
    fill(browser, "#message", text)
    browser.key("Enter")
    answered(browser)


def texts(browser, selector):
    found = f"document.querySelectorAll({json.dumps(selector)})"
    return browser.run(f"return [...{found}].map((each) => each.textContent)")


def is_shown(browser, selector):
    return browser.run(f"return document.querySelector({json.dumps(selector)}).checkVisibility()")


def focused(browser):
    return browser.run(
        "const found = document.activeElement; return found.id || found.className || found.tagName"
    )


def overflow(browser):
    return browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


def words(server, ids):
    return [server.words[token] for token in ids]


def open_token(browser, i):
    browser.mouse(f".text .token[data-i='{i}']", clicks=1)
    inside = "document.querySelector('#lens').checkVisibility()"
    browser.until(f"{inside} || document.querySelector('#lens-note').textContent")


def test_answer_streams_as_tokens_over_a_strip_of_their_surprise(browser, server):
    open_page(browser, server)
    assert browser.text("#about") == "3 layers of 4 heads · context 1,024"
    chat(browser)
    assert browser.text(".text") == ANSWER and "".join(texts(browser, ".text .token")) == ANSWER
    (asked,) = server.of("/v1/chat/completions")
    assert asked["messages"] == [{"role": "user", "content": QUESTION}]
    assert asked["stream"] and asked["logprobs"] and asked["top_logprobs"] == 10
    assert (asked["temperature"], asked["max_tokens"]) == (0.8, 256) and "seed" not in asked
    shade = "map((each) => each.style.getPropertyValue('--s'))"
    shades = browser.run(f"return [...document.querySelectorAll('.strip .token')].{shade}")
    surprise = [float(each) * 6 for each in shades]
    assert len(surprise) == len(texts(browser, ".text .token")) and min(surprise) < 0.1 and max(surprise) > 1
    assert re.match(r"18 tokens · .*mean surprise 0\.\d\d$", browser.text(".foot span"))
    assert [path for path, _ in server.requests] == [
        "/v1/chat/completions"
    ]  # no inside before a token is opened


def test_opened_token_shows_its_probability_the_alternatives_and_the_inside(browser, server):
    open_page(browser, server, width=1280)
    chat(browser)
    open_token(browser, 4)
    assert browser.text("#panel-name") == "Token ·the"
    assert re.match(
        r"5 of 18 · id \d+ · probability 25 % · surprise 1\.40 nats · rank 2$", browser.text("#facts")
    )
    assert len(texts(browser, "#alternatives button")) == 10
    assert texts(browser, "#alternatives [aria-current]") == ["·the25 %"]
    prompt = [*words(server, server.ids(SENT)), *words(server, server.ids(ANSWER)[:4])]
    for path in ("/v1/attention", "/v1/lens"):  # the query that predicted it: the last token before
        (asked,) = server.of(path)
        assert words(server, asked["prompt"]) == prompt and "position" not in asked
    assert words(server, [server.of("/v1/lens")[0]["answer"]]) == [" the"]
    assert len(texts(browser, "#heads button")) == LAYERS * HEADS + 1
    assert texts(browser, "#looked span") == prompt
    assert texts(browser, "#lens tr th:first-child") == ["layer", "embed", "layer 0", "layer 1", "output"]
    assert texts(browser, "#lens .same") == ["·the", "·the"]
    weight = "return Number(document.querySelector('#looked span').title.split(': ')[1])"
    mean = browser.run(weight)
    browser.mouse("#heads [data-key='2.1']", clicks=1)
    assert browser.run(weight) > mean and browser.text("#head-facts").startswith(
        "layer 2, head 1: most attention to <user>"
    )

    def choose(measure):
        change = f"found.value = '{measure}'; found.dispatchEvent(new Event('change'))"
        browser.run(f"const found = document.querySelector('#measure'); {change}")

    choose("beyond")  # the text's shading leaves the first token out
    shade = "each.style.getPropertyValue('--w')"
    shades = browser.run(f"return [...document.querySelectorAll('#looked span')].map((each) => {shade})")
    assert float(shades[0]) == 0 and max(map(float, shades)) == 1
    choose("entropy")
    assert browser.run("return document.querySelector('#heads [data-key=\"0.1\"]').title").endswith("nats")
    assert len(server.of("/v1/attention")) == 1  # another head costs no request


def test_alternative_is_followed_from_its_place_in_chat(browser, server):
    open_page(browser, server, width=1280)
    chat(browser)
    chat(browser, "And then?")
    open_token(browser, 4)
    browser.mouse("#alternatives li:nth-child(3) button", clicks=1)
    answered(browser)
    assert browser.text(".text") == "The cat sat on other2 so it went on."
    (asked,) = server.of("/v1/completions")
    assert words(server, asked["prompt"]) == [
        *words(server, server.ids(SENT)),
        "The",
        " cat",
        " sat",
        " on",
        " other2",
    ]
    assert asked["logprobs"] == 10 and asked["stream"]
    assert len(texts(browser, ".answer")) == 1  # what followed the old answer is gone
    assert browser.text("#panel-name") == "Token ·other2" and browser.text("#facts").startswith("5 of 9 ·")
    chat(browser, "And now?")
    assert (
        server.of("/v1/chat/completions")[-1]["messages"][1]["content"]
        == "The cat sat on other2 so it went on."
    )


def test_alternative_that_is_a_part_of_a_character_shows_the_replacement_character(browser, server):
    part = {"id": server.id_of("part"), "token": r"bytes:\xe2\x80", "logprob": -2}
    server.canned = [
        {
            "delta": {"content": "whole"},
            "token_ids": [server.id_of("whole")],
            "logprobs": {"content": [{"token": "whole", "logprob": -0.5, "top_logprobs": [part]}]},
        },
        {"delta": {}, "finish_reason": "length"},
    ]
    open_page(browser, server, width=1280)
    chat(browser)
    server.canned = None
    open_token(browser, 0)
    assert texts(browser, "#alternatives button")[0] == r"bytes:\xe2\x8014 %"
    browser.mouse("#alternatives li:nth-child(1) button", clicks=1)
    answered(browser)
    assert browser.text(".text").startswith("\ufffd")
    assert words(server, server.of("/v1/completions")[0]["prompt"])[-1] == "part"


def test_alternative_without_an_id_is_tokenized(browser, server):
    server.legacy = True
    open_page(browser, server, width=1280)
    chat(browser)
    open_token(browser, 0)
    browser.mouse("#alternatives li:nth-child(2) button", clicks=1)
    browser.until("document.querySelector('.foot span').textContent.startsWith('5 tokens')")
    assert server.of("/tokenize") == [{"prompt": " other1", "add_special_tokens": False}]
    assert browser.text(".text") == " other1 so it went on."
    open_token(browser, 1)
    assert len(texts(browser, "#alternatives button")) == 10


def test_token_that_is_not_among_the_ten_is_listed_below_them(browser, server):
    top = [{"id": server.id_of(f" o{i}"), "token": f" o{i}", "logprob": -1 - i / 9} for i in range(10)]
    entry = {"token": "rare", "logprob": -7.5, "top_logprobs": top}
    choice = {
        "delta": {"content": "rare"},
        "token_ids": [server.id_of("rare")],
        "logprobs": {"content": [entry]},
    }
    server.canned = [choice, {"delta": {}, "finish_reason": "stop"}]
    open_page(browser, server, width=1280)
    chat(browser)
    open_token(browser, 0)
    assert texts(browser, "#alternatives button")[-1] == "rare0.1 %" and browser.text("#facts").endswith(
        "rank above 10"
    )
    assert not is_shown(browser, ".foot button")  # an answer that has ended is not continued


def test_running_answer_is_stopped_and_nothing_inside_is_asked_for_meanwhile(browser, server):
    server.endless, server.pause = True, 0.01
    open_page(browser, server, width=1280)
    for way in ("button", "Escape"):
        server.cut.clear()
        fill(browser, "#message", QUESTION)
        browser.key("Enter")
        browser.until("document.querySelectorAll('.answer:last-child .text .token').length > 5")
        browser.mouse(".answer:last-child .text .token[data-i='1']", clicks=1)
        assert browser.text("#lens-note") == "Available when the answer is finished."
        assert not server.of("/v1/lens") or way == "Escape"
        assert browser.text("#chat-form .go") == "Stop"
        if way == "Escape":
            browser.key("Escape")
        else:
            browser.mouse("#chat-form .go", clicks=1)
        answered(browser)
        assert server.cut.wait(10) and browser.text("#chat-form .go") == "Send"
        assert "stopped" in texts(browser, ".foot span")[-1]
        browser.until("document.querySelector('#lens').checkVisibility()")  # now it is
        assert browser.text(".answer:last-child .text").startswith("The cat sat on the mat,\n")


def test_message_is_edited_and_an_answer_regenerated(browser, server):
    open_page(browser, server)
    chat(browser)
    chat(browser, "Second")
    browser.run("document.querySelector('#settings').open = true")
    fill(browser, "#system", "Be brief.")
    browser.run("document.querySelector('.answer .foot button:last-child').click()")
    answered(browser)
    asked = server.of("/v1/chat/completions")[-1]
    assert [each["content"] for each in asked["messages"]] == ["Be brief.", QUESTION] and len(
        texts(browser, ".user")
    ) == 1
    chat(browser, "Second")
    browser.run("document.querySelector('.user button').click()")
    browser.type(" Please.")
    assert overflow(browser) <= 0
    browser.key("Enter")
    answered(browser)
    assert texts(browser, ".bubble") == [f"{QUESTION} Please."] and len(texts(browser, ".answer")) == 1
    asked = server.of("/v1/chat/completions")[-1]
    assert [each["role"] for each in asked["messages"]] == ["system", "user"]
    browser.run("document.querySelector('.user button').click()")
    browser.key("Escape")
    assert (
        texts(browser, ".bubble") == [f"{QUESTION} Please."] and len(server.of("/v1/chat/completions")) == 5
    )
    browser.mouse("#new", clicks=1)
    assert texts(browser, ".bubble, .answer") == [] and is_shown(browser, "#chat-empty")


def test_sampling_controls_are_sent_and_wrong_ones_are_not(browser, server):
    open_page(browser, server)
    browser.run("document.querySelector('#settings').open = true")
    for name, value in {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 7,
        "seed": 3,
    }.items():
        script = f"const found = document.querySelector('[name={name}]'); found.value = {value};"
        browser.run(f"{script} found.dispatchEvent(new Event('input', {{ bubbles: true }}))")
    assert "temperature 0 · top_p 0.9 · top_k 40" in browser.text("#chosen")
    chat(browser)
    (asked,) = server.of("/v1/chat/completions")
    sent = [asked[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")]
    assert sent == [0, 0.9, 40, 0.05, 7, 3]
    browser.run("document.querySelector('[name=top_p]').value = 2")
    fill(browser, "#message", "more")
    browser.key("Enter")
    assert len(server.of("/v1/chat/completions")) == 1 and focused(browser) == "INPUT"


def test_text_is_completed_and_continued_by_its_ids(browser, server):
    open_page(browser, server)
    browser.mouse("#tab-completion", clicks=1)
    fill(browser, "#prompt", "Once upon\n a time")
    browser.key("Enter")
    answered(browser)
    assert browser.text(".text") == "Once upon\n a time so it went on."
    assert texts(browser, ".text .token") == [" so", " it", " went", " on."]
    browser.mouse(".foot button", clicks=1)
    browser.until(
        "document.querySelectorAll('.text .token').length === 8 && !document.querySelector('.busy')"
    )
    first, second = server.of("/v1/completions")
    assert "".join(words(server, first["prompt"])) == "Once upon\n a time"
    assert second["prompt"] == [*first["prompt"], *server.ids(" so it went on.")]
    assert overflow(browser) <= 0
    open_token(browser, 6)
    assert words(server, server.of("/v1/lens")[0]["prompt"])[-3:] == [" on.", " so", " it"]


def test_everything_is_done_by_keyboard(browser, server):
    open_page(browser, server, width=1280)
    for _ in range(20):
        browser.key("Tab")
        if focused(browser) == "message":
            break
    browser.type(QUESTION)
    browser.key("Enter")
    answered(browser)
    assert focused(browser) == "message"
    for _ in range(4):  # back over the answer's button to its tokens
        browser.key("Tab", shift=True)
        if "token" in focused(browser):
            break
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    for name, at in [
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("ArrowDown", "7"),
        ("ArrowUp", "1"),
    ]:
        browser.key(name)
        there = browser.run("return document.activeElement.dataset.i")
        assert there == at or (name == "ArrowDown" and int(there) > 6)
    browser.key("Enter")
    browser.until("document.querySelector('#lens').checkVisibility()")
    assert focused(browser) == "panel" and browser.text("#panel-name") == "Token ·cat"
    for name in ("next", "close"):  # the one before and the one after, close
        while focused(browser) != name:
            browser.key("Tab")
        if name == "next":
            browser.key("Enter")
            browser.until("document.querySelector('#lens').checkVisibility()")
    assert browser.text("#panel-name") == "Token ·sat"
    while browser.run("return document.activeElement.getAttribute('role')") != "radio":
        browser.key("Tab")
    browser.key("ArrowDown")
    assert re.match(r"layer 0, head \d: most attention to ", browser.text("#head-facts"))
    browser.key("Escape")
    assert not is_shown(browser, "#panel") and browser.run("return document.activeElement.dataset.i") == "2"
    browser.key("Enter")
    browser.until("document.querySelector('#lens').checkVisibility()")
    while browser.run("return document.activeElement.closest('#alternatives') === null"):
        browser.key("Tab")
    browser.key("ArrowDown")
    browser.key("Enter")
    answered(browser)
    assert browser.text(".text") == "The cat other1 so it went on."


def test_text_of_users_and_models_stays_text(browser, server):
    server.answer = server.continuation = HOSTILE
    open_page(browser, server, width=1280)
    chat(browser, HOSTILE)
    assert browser.text(".text") == HOSTILE and browser.text(".bubble") == HOSTILE
    open_token(browser, 2)
    assert browser.text("#looked").startswith(f"<user>{HOSTILE}")
    browser.mouse("#alternatives li:nth-child(2) button", clicks=1)
    answered(browser)
    browser.mouse("#tab-completion", clicks=1)
    fill(browser, "#prompt", HOSTILE)
    browser.key("Enter")
    browser.until("document.querySelector('#output .token') && !document.querySelector('.busy')")
    assert browser.text("#output .text") == HOSTILE * 2
    server.failure = (400, HOSTILE)
    browser.run("document.querySelector('#output .foot button:last-child').click()")
    browser.until("document.querySelector('#output .error').textContent")
    assert browser.text("#output .error") == HOSTILE
    made = "return [window.hit, document.querySelectorAll('img, script:not([src]), [onerror]').length]"
    assert browser.run(made) == [None, 0]


def test_parts_of_characters_held_back_text_and_several_tokens_at_once(browser, server):
    parts = [
        (["é1"], "", None),
        (["é2"], "é", None),
        ([" a", " b"], " a b", None),
        ([" c", " d"], " c", None),
        ([], " d", "stop"),
    ]
    server.canned = []
    for tokens, text, reason in parts:
        ids = [server.id_of(each) for each in tokens]
        entries = [{"token": each, "logprob": -1, "top_logprobs": []} for each in tokens]
        choice = {
            "delta": {"content": text},
            "token_ids": ids,
            "logprobs": {"content": entries},
            "finish_reason": reason,
        }
        server.canned.append({"index": 0, **choice})
    open_page(browser, server)
    chat(browser)
    assert texts(browser, ".text .token") == ["", "é", " a", " b", "", " c d"]
    open_token(browser, 0)
    assert browser.text("#panel-name") == "Token é1"


def test_end_of_an_answer_can_be_opened(browser, server):
    open_page(browser, server)
    chat(browser)
    browser.mouse(".text .token.end", clicks=1)
    assert browser.text("#panel-name") == f"Token {END}"


def test_model_without_a_template_completes_only(browser, server):
    server.chat = False
    open_page(browser, server)
    assert is_shown(browser, "#prompt") and not is_shown(browser, "#message")
    assert browser.text("#no-chat") == "Chat is off: this model has no chat template." and is_shown(
        browser, "#no-chat"
    )
    browser.mouse("#tab-chat", clicks=1)
    assert not is_shown(browser, "#message")


def test_inside_that_is_switched_off_or_too_long_is_said_in_one_line(browser, server):
    server.internals = False
    open_page(browser, server)
    chat(browser)
    open_token(browser, 2)
    note = "Activations are switched off on this server (--no-internals)."
    assert browser.text("#attention-note") == browser.text("#lens-note") == note
    assert not server.of("/v1/lens") and len(texts(browser, "#alternatives button")) == 10
    server.reset()
    open_page(browser, server)
    chat(browser, "word " * 600)
    open_token(browser, 2)
    assert re.match(r"prompt must have at most 512 tokens; got \d+\. Shorten it$", browser.text("#lens-note"))


def test_key_is_asked_for_and_kept_for_the_session(browser, server):
    server.key = "secret"
    open_page(browser, server)
    assert browser.text("#error") == "an API key is needed; got none or a wrong one" and is_shown(
        browser, "#key"
    )
    fill(browser, "#key-field", "secret")
    browser.key("Enter")
    browser.until("!document.querySelector('#key').checkVisibility()")
    chat(browser)
    assert browser.text(".text") == ANSWER and not is_shown(browser, "#error")
    assert browser.run(
        "return [sessionStorage.getItem('lama-key'), Object.keys(localStorage).includes('lama-key')]"
    ) == ["secret", False]


def test_errors_are_one_line_at_the_answer(browser, server):
    server.failure = (429, "the queue is full")
    open_page(browser, server)
    fill(browser, "#message", QUESTION)
    browser.key("Enter")
    browser.until("document.querySelector('.answer .error')?.textContent")
    assert browser.text(".answer .error") == "the queue is full" and browser.text("#chat-form .go") == "Send"
    server.failure = None
    browser.mouse(".foot button:last-child", clicks=1)  # regenerate
    answered(browser)
    assert browser.text(".text") == ANSWER and len(texts(browser, ".answer")) == 1
    server.canned = [{"delta": {"content": "a"}, "token_ids": [0]}, {"error": {"message": "it failed"}}]
    browser.mouse(".foot button:last-child", clicks=1)
    answered(browser)
    assert browser.text(".answer .error") == "it failed" and browser.text(".text") == "a"
    assert texts(browser, ".foot button") == ["Continue", "Regenerate"] and is_shown(browser, ".foot button")


def test_page_waits_for_a_model_that_is_loading(browser, server):
    server.loading = 1
    open_page(browser, server)
    assert browser.text("#error") == "the model is loading; try again"
    browser.until("!document.querySelector('#error').checkVisibility()")
    assert browser.text("#name") == "lama · tiny-model"


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone_in_light_and_dark(browser, server, dark):
    server.answer = f"{'long' * 60} {ANSWER}"
    open_page(browser, server, width=360, dark=dark)
    back = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 150) == dark
    assert overflow(browser) <= 0
    browser.run("document.querySelector('#settings').open = true")
    assert overflow(browser) <= 0
    chat(browser, "long" * 60)
    open_token(browser, 3)
    assert overflow(browser) <= 0
    top = "return document.querySelector('.text .active').getBoundingClientRect().bottom"
    assert browser.run(top) <= browser.run(
        "return document.querySelector('#panel').getBoundingClientRect().top"
    )
    browser.mouse("#theme", clicks=1)
    other = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.run("localStorage.removeItem('lama-theme')")
    assert (sum(map(int, re.findall(r"\d+", other))) < 150) != dark


def test_page_before_the_real_server():
    """Chat, an opened token and an alternative, on a small random model; no console errors."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from servers import listening, running

    with running(context=256) as service, listening(service) as url, Browser() as browser:
        browser.open(f"{url}/")
        chat(browser, "Hello")
        before = texts(browser, ".token")
        open_token(browser, 3)
        assert re.search(r"4 of \d+ · id \d+ · probability", browser.text("#facts"))
        assert len(texts(browser, "#alternatives button")) >= 10
        browser.until("document.querySelector('#lens').checkVisibility()")
        assert texts(browser, "#lens tr th:first-child") == ["layer", "embed", "layer 0", "output"]
        assert len(texts(browser, "#heads button")) == 2 * 2 + 1
        browser.run("document.querySelectorAll('#alternatives button:not([aria-current])')[0].click()")
        browser.until("!document.querySelector('.busy')")
        answered(browser)
        after = texts(browser, ".token")
        assert after != before and after[:3] == before[:3]
        assert "bytes:" not in browser.text(".text")
        assert [each for each in browser.complaints if not each.startswith(f"asked for {url}/")] == []
